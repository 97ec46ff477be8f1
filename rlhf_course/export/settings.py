"""The settings of `rlhf-course export`; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from rlhf_course.stages.flags import Folder, Name

Library = Literal["openrlhf", "trl", "verl"]
StageName = Annotated[
    Literal["sft", "reward-model", "dpo", "ppo"] | None,
    arg(metavar="{sft,reward-model,dpo,ppo}", help_behavior_hint=""),
]


@dataclass
class ExportConfig:
    """Move on: write the data in another library's schema, and the command for the same stage."""

    to: Library = "trl"
    """Which library."""
    run: Folder = None
    """A run folder: its stage, data, model and settings are exported as they were."""
    stage: StageName = None
    """Without --run: which stage."""
    data: Name = None
    """Without --run: the data, as the stage takes them [default: the embedded world]."""
    model: Name = None
    """The model to start from [default: the run's, or the stage's own default]."""
    settings: str = ""
    """Without --run: the stage's other flags in one string, such as --settings="--lr 1e-5"."""
    out: Folder = None
    """Folder to write: data, run.sh and what it needs [default: exports/LIBRARY-STAGE]."""
