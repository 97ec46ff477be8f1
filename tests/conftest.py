"""What every test shares: one thread (the machine may be small), no network.

The fixtures `golden`, `subject` and `rng` come from rlhf_course.coursework.plugin.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

torch.set_num_threads(1)
