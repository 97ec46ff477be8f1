"""`rlhf-course plan`: the bundles that `ppo-ray` would reserve, and what fits on them."""

from rlhf_course.distributed.placement import place
from rlhf_course.planning.plan import show_plan
from rlhf_course.planning.search import Plan
from rlhf_course.planning.settings import PlanConfig


def plan(config: PlanConfig) -> Plan:
    """Print the best plan for these settings and, with --json, write it."""
    return show_plan(config, place)
