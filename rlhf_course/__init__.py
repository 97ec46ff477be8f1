"""RLHF from scratch: GPT, SFT, reward model and PPO-ptx, one module a chapter.

Importing the package loads none of its modules, so it costs nothing; import the one you need:

    from rlhf_course.ppo import policy_loss

For notebooks there are two more names, imported when they are first used:

    from rlhf_course import check, lab
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "check":
        from rlhf_course.coursework.check import check

        return check
    if name == "lab":
        from importlib import import_module

        return import_module("rlhf_course.coursework.lab")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
