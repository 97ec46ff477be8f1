"""The settings of the commands that train nothing: talk to models, look at data, write a world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from rlhf_course.choices import DeviceName, DtypeName
from rlhf_course.stages.flags import BadRows, Count, Folder, Name, Rejected, Size, WorldName


@dataclass
class ChatConfig:
    """Talk to two checkpoints side by side."""

    model: Name = None
    """Directory or hub name of the first [default: the PPO run of --world, --size, --seed]."""
    against: Name = None
    """Directory or hub name of the second [default: the SFT run beside it]."""
    world: WorldName = "town"
    """Whose runs to load, and whose labeler judges answers to its questions."""
    size: Size = "small"
    """Size of the runs."""
    seed: int = 0
    """Seed of the runs, of their world, and of the sampling."""
    runs: Folder = None
    """Folder that holds the runs ppo and sft [default: runs/WORLD-SIZE-seedN]."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the likeliest token each time."""
    max_new_tokens: Count = None
    """Longest answer [by world, 64 if --model and --against are given; less at a context's end]."""
    device: DeviceName = "auto"
    """Where to run: CUDA if there is one, else Apple's MPS, else the CPU."""
    dtype: DtypeName = "auto"
    """Precision of matrix products."""
    threads: Count = None
    """CPU threads [default: OMP_NUM_THREADS, else one a core, at most 8]."""

    @property
    def out(self) -> Path | None:
        """Where this stage would stand among the runs; it writes nothing."""
        return self.runs / "chat" if self.runs else None


@dataclass
class DataConfig:
    """Look at a data set: what it is, what each stage could learn from it, what is wrong in it."""

    source: Annotated[str, Positional] = ""
    """File, folder or hub name [it has to be given]."""
    columns: Name = None
    """Columns under other names: prompt=question,response=answer (ours=theirs)."""
    recipe: Name = None
    """How to read a known data set, or none [default: by its name or the first row's fields]."""
    bad_rows: BadRows = None
    """Stop at a row that cannot be used, or count it [default: drop, which counts]."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Leave out equal rows but the first, and all comparisons that contradict each other."""
    rows: Count = None
    """Read only so many rows, the first; of a hub name no more are fetched."""
    rejected: Rejected = None
    """Make comparisons of a set without: each answer against another row's."""
    seed: int = 0
    """Seed of what is drawn."""
    tokenizer: Name = None
    """Directory or hub name whose tokens are counted [default: words are counted]."""
    json: bool = False
    """Print JSON."""


@dataclass
class WorldConfig:
    """Write an embedded world's data as files: corpus, demonstrations, comparisons, tokenizer."""

    world: WorldName = "town"
    """Which world."""
    size: Size = "small"
    """How much of everything."""
    seed: int = 0
    """Seed of everything random."""
    out: Folder = None
    """Folder to write [default: worlds/WORLD-SIZE-seedN]."""
