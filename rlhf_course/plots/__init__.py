"""Figures: rows of metrics in, a matplotlib Figure out.

    from rlhf_course.plots import CAPTIONS, stage_curves
    stage_curves("ppo", read_metrics("runs/town-small-seed0/ppo")).savefig("ppo.svg")

Nothing here knows a run folder or a backend: figures are built with matplotlib's object-oriented
interface, so a notebook, a script and the report draw alike and no global setting changes.
CAPTIONS says of each figure what there is to see.
"""

from rlhf_course.plots.results import (
    honesty,
    kl_control,
    overoptimisation,
    perplexity_bars,
    reward_accuracy,
)
from rlhf_course.plots.stages import stage_curves
from rlhf_course.plots.style import CAPTIONS, COLOURS, smooth

__all__ = [
    "CAPTIONS", "COLOURS", "honesty", "kl_control", "overoptimisation", "perplexity_bars",
    "reward_accuracy", "smooth", "stage_curves",
]  # fmt: skip
