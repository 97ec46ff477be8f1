"""`rlhf-course plan`: the bundles that `ppo-ray` would reserve, and what fits on them; or what fits
on one GPU."""

from rlhf_course.distributed.placement import place
from rlhf_course.planning.one_plan import show_one
from rlhf_course.planning.plan import show_plan
from rlhf_course.planning.settings import PlanConfig


def plan(config: PlanConfig) -> None:
    """Print the best plan for these settings and, with --json, write it."""
    if config.stage == "cluster":
        show_plan(config, place)
    else:
        show_one(config)
