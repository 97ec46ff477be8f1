"""The stages of RLHF, one module each: thin shells in which the mathematics meets the run folder.

pretrain → sft → comparisons → reward_model → ppo, then evaluate. Each reads what the stage before
it wrote and writes a run folder of its own (see `rlhf_course.runs`).
"""
