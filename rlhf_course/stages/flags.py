"""What the settings of the stages share: types that tyro turns into flags, and common fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rlhf_course.choices import DeviceName, DtypeName, Schedule, Track

Size = Literal["tiny", "small", "gpt2"]
WorldName = Literal["town", "reviews"]

# Left unset unless the flag is given; what is taken then stands in the field's own text.
Count = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Number = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
YesNo = Annotated[bool | None, arg(metavar="{True,False}", help_behavior_hint="")]
Pooling = Annotated[
    Literal["last", "mean", "sum"] | None, arg(metavar="{last,mean,sum}", help_behavior_hint="")
]
Normalization = Annotated[
    Literal["bias", "gain_bias", "none"] | None,
    arg(metavar="{bias,gain_bias,none}", help_behavior_hint=""),
]
BadRows = Annotated[
    Literal["stop", "drop"] | None, arg(metavar="{stop,drop}", help_behavior_hint="")
]
TooLong = Annotated[
    Literal["stop", "drop", "cut"] | None, arg(metavar="{stop,drop,cut}", help_behavior_hint="")
]
Rejected = Annotated[Literal["shuffled"] | None, arg(metavar="{shuffled}", help_behavior_hint="")]


Quantize = Annotated[
    Literal["8bit", "4bit"] | None, arg(metavar="{8bit,4bit}", help_behavior_hint="")
]
Names = Annotated[tuple[str, ...] | None, arg(metavar="NAME…", help_behavior_hint="")]

ProfileName = Annotated[
    Literal["laptop-8gb", "colab-t4", "colab-a100", "cpu"] | None,
    arg(metavar="{laptop-8gb,colab-t4,colab-a100,cpu}", help_behavior_hint=""),
]


@dataclass
class Common:
    """What every stage has."""

    world: WorldName = "town"
    """Embedded world, used when no --data is given."""
    size: Size = "small"
    """The one dial: model shape, data and every setting left unset follow from it."""
    seed: int = 0
    """Seed of everything random."""
    world_seed: Count = None
    """Seed of the world's people and texts [default: --seed]."""
    out: Folder = None
    """Run folder [default: runs/WORLD-SIZE-seedN/STAGE]."""
    overwrite: bool = False
    """Replace a run folder that holds another run."""
    checkpoint_every: int = 50
    """Steps between two checkpoints."""
    track: Track = "tensorboard"
    """Where the curves go besides metrics.jsonl: TensorBoard, Weights & Biases, both or neither."""
    device: DeviceName = "auto"
    """Where to run: CUDA if there is one, else Apple's MPS, else the CPU."""
    dtype: DtypeName = "auto"
    """Precision of matrix products; weights are float32 always."""
    threads: Count = None
    """CPU threads [default: OMP_NUM_THREADS, else one a core, at most 8]."""


@dataclass
class ProfileFlag:
    """Settings of a machine."""

    profile: ProfileName = None
    """Settings for a machine, where flags leave them open: --dtype, and with --data model, adapter,
    batches and lengths. They are printed."""


@dataclass
class Optimization:
    """Optimiser settings shared by the supervised stages."""

    steps: Count = None
    """Updates [by size]."""
    batch: Count = None
    """Sequences (for the reward model: prompts) an update [by size]."""
    lr: Number = None
    """Peak learning rate [by size]."""
    schedule: Schedule = "linear"
    """Learning-rate schedule after the warm-up."""
    warmup: Count = None
    """Updates of warm-up [by size]."""
    lr_floor: float = 0.05
    """The schedule ends at this share of the peak."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""


LORA_FLAGS = ("lora", "lora_alpha", "lora_targets", "quantize")


@dataclass
class ModelFlags:
    """How a model is held and trained: all of it, or an adapter over frozen weights."""

    lora: Count = None
    """Rank of a LoRA adapter (peft) that is trained in place of the weights, 16 for example."""
    lora_alpha: Number = None
    """The adapter counts alpha / rank [default: twice the rank]."""
    lora_targets: Names = None
    """Layers that get one, such as q_proj v_proj [default: all linear layers of the blocks]."""
    quantize: Quantize = None
    """Frozen weights under --lora in 8 or 4 bits (bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Compute activations once more in the backward pass instead of keeping them."""


@dataclass
class DataFlags:
    """How --data is read, for every stage that takes it."""

    columns: Name = None
    """Columns of --data under other names: prompt=question,response=answer (ours=theirs); no other
    column is read then."""
    recipe: Name = None
    """How to read a known data set, or none [default: by its name or the first row's fields]."""
    bad_rows: BadRows = None
    """Stop at a row that cannot be used, or leave it out [default: stop; recipes: drop]."""
    too_long: TooLong = None
    """Rows beyond the context: stop, leave out, or cut, a dialogue's oldest turns first [default:
    stop; recipes: drop]."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Leave out equal rows but the first, and all comparisons that contradict each other."""
    rows: Count = None
    """Read only so many rows, the first; of a hub name no more are fetched."""


def as_flags(changed: dict) -> str:
    """{"offload": "optimizer", "colocate": False} -> "--offload optimizer --no-colocate"."""
    words = []
    for name, value in changed.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append("--" + ("" if value else "no-") + flag)
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)
