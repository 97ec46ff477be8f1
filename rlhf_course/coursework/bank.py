"""Where the exercises' tests and mutants stand: in the repository, or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import rlhf_course
from rlhf_course.errors import ConfigError


def folder() -> Path:
    """The folder with `exercises/`, `mutants/` and `data/`.

    Raises ConfigError when neither is there.
    """
    package = Path(rlhf_course.__file__).parent
    for place in (package / "coursework" / "bank", package.parent / "tests"):
        if (place / "exercises").is_dir():
            return place
    raise ConfigError(f"{package}: the exercises' tests are missing. Reinstall the package.")
