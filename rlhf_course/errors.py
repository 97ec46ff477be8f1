"""The errors a user can mend: a wrong file, checkpoint, setting or run.

Every message says three things in this order: what was wrong, where (file and row, tensor, flag),
and what to do about it. The command line prints the message without a traceback and exits with 2.
Anything that is not a `CourseError` is a mistake in the package itself and keeps its traceback.
"""

import math
from collections.abc import Mapping
from typing import SupportsFloat

EXIT_CODE = 2
"""What the command line exits with after a `CourseError`."""


class CourseError(Exception):
    """A problem that the user can mend. Raise one of its subclasses."""


class DataError(CourseError):
    """A data set is missing, empty or malformed: the message names file, row and field."""


class ModelError(CourseError):
    """A model or tokenizer cannot be loaded or does not fit: unknown name, too short a context."""


class CheckpointError(CourseError):
    """A checkpoint is damaged, incomplete, of another shape, or cannot be written."""


class TrainingError(CourseError):
    """Training cannot go on: a loss or reward is NaN or infinite, or a reward function failed."""


class ConfigError(CourseError):
    """A setting is unknown, out of range, or contradicts another one."""


class GradingError(CourseError):
    """The autograder cannot work: players do not start here, or it has been damaged itself."""


class Interrupted(Exception):
    """Ctrl-C was pressed, and what was to be saved has been. The command line exits with 130."""


def check_finite(terms: Mapping[str, SupportsFloat], where: str) -> None:
    """Raise TrainingError naming every term that is NaN or infinite.

    Called after the backward pass and before the optimiser steps, so the weights are still good.
    """
    bad = [name for name, value in terms.items() if not math.isfinite(float(value))]
    if bad:
        raise TrainingError(
            f"{where}: {', '.join(bad)} is NaN or infinite. Nothing was updated in this step, and "
            "the last checkpoint is good: lower the learning rate (--lr) or the largest gradient "
            "norm (--max-grad-norm), and look at the data of this step."
        )
