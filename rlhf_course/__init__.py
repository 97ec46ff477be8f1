"""RLHF from scratch: GPT, SFT, reward model and PPO-ptx, one module a chapter.

Importing the package loads none of its modules, so it costs nothing; import the one you need:

    from rlhf_course.ppo import policy_loss
"""

__version__ = "0.1.0"
