"""The settings of the coursework's commands; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class ProgressConfig:
    """Show which exercises are done. It runs the functions in your notebooks, nothing else."""

    notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("chapters"),)
    """Notebooks, or folders of them."""
