"""The words that some settings choose between, apart from the code that acts on them.

The command line knows them without loading torch, so that `--help` does not wait for it.
"""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]
Track = Literal["tensorboard", "wandb", "both", "none"]
