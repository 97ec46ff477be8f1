"""What the report is about: a folder with evaluation.json and the runs of one experiment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_course.errors import CheckpointError
from rlhf_course.runs import read_json, read_metrics

NAMES = {
    "pretrain": "Pretraining", "sft": "SFT", "comparisons": "Comparisons",
    "reward_model": "Reward model", "ppo": "PPO-ptx", "pretrained": "pretrained",
    "evaluation": "Evaluation",
}  # fmt: skip
STAGES = ("pretrain", "sft", "comparisons", "reward_model", "ppo", "other")
WORDS = {"kl": "KL", "ptx": "ptx"}
GROUPS = {"known": "known people"}
POOLINGS = {"last": "at the EOS", "mean": "mean over tokens", "sum": "sum over tokens"}


def label(name: str) -> str:
    """What a run folder or policy is called: ppo_no_kl_no_ptx -> "PPO without KL and ptx"."""
    if name in NAMES:
        return NAMES[name]
    for stage, called in (("reward_model_", "Reward model, {}"), ("ppo_", "PPO, {}")):
        rest = name.removeprefix(stage)
        if rest != name:
            left_out = f"_{rest}".split("_no_")
            if left_out[0] == "" and stage == "ppo_":
                return "PPO without " + " and ".join(WORDS.get(w, w) for w in left_out[1:])
            return called.format(rest.replace("_", " "))
    return name.replace("_", " ")


def stage_of(name: str) -> str:
    """The stage that a run folder belongs to: reward_model_mean -> reward_model, else "other"."""
    return next((s for s in STAGES[:-1] if name == s or name.startswith(f"{s}_")), STAGES[-1])


def in_order(names: Mapping | Iterable[str]) -> dict:
    """Runs or policies in the order of the pipeline, alternatives behind their stage.

    JSON files are written with sorted keys, so "ppo" stands before "sft" there.
    """
    names = names if isinstance(names, Mapping) else dict.fromkeys(names)
    order = sorted(names, key=lambda name: (STAGES.index(stage_of(name)), len(name), name))
    return {name: names[name] for name in order}


@dataclass
class Workspace:
    """What stands in a folder: evaluation.json, and of every run its configuration and metrics."""

    path: Path
    evaluation: dict = field(default_factory=dict)
    runs: dict[str, list[dict]] = field(default_factory=dict)
    configs: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Workspace:
        """Everything that is there. Raises CheckpointError for a damaged file."""
        found = cls(path)
        if (path / "evaluation.json").exists():
            found.evaluation = read_json(path / "evaluation.json")
        for name in in_order(file.parent.name for file in path.glob("*/config.json")):
            folder = path / name
            found.configs[folder.name] = read_json(folder / "config.json")
            found.runs[folder.name] = _metrics(folder)
        return found

    @property
    def title(self) -> str:
        """Of the page."""
        return f"RLHF from end to end: {self.evaluation.get('world', self.path.resolve().name)}"

    @property
    def subtitle(self) -> str:
        """Size, seed, device, time."""
        e = self.evaluation
        parts = [f"{key} {e[key]}" for key in ("size", "seed") if key in e]
        parts += [str(e["device"])] if "device" in e else []
        parts += [f"{math.fsum(e['seconds'].values()) / 60:.1f} minutes"] if "seconds" in e else []
        return " · ".join(parts)

    @property
    def policies(self) -> dict[str, dict]:
        """Name -> figures of every evaluated policy, SFT first."""
        return in_order(self.evaluation.get("policies", {}))

    def kl_target(self, name: str) -> float | None:
        """What a PPO run's controller aimed at; None when there was no controller."""
        config = self.configs.get(name, {})
        if not config.get("kl_coef") or config.get("kl_controller") == "fixed":
            return None
        return config.get("kl_target")


def _metrics(folder: Path) -> list[dict]:
    try:
        return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'metrics.jsonl'}: not JSON lines ({error}). If the run was killed, go on "
            "with the same command: it mends the file."
        ) from error
