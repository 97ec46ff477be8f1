"""Model cards: the README.md beside a stage's model, ready for the Hugging Face hub.

What the model is, how it was made, on what data, what was measured, how to load it, what it is not
good for, and whose licence it is under. No path of the machine that trained it is in it. Uploading:

    hf upload YOUR-NAME/MODEL runs/town-small-seed0/sft/model
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

from rlhf_course import __version__, checkpoints
from rlhf_course.data_report import DataReport
from rlhf_course.progress import console
from rlhf_course.sources import HUB_NAME, short_name
from rlhf_course.stages.card_texts import LIMITS, LOADING, PATHS, STAGES, TITLES, WORLDS
from rlhf_course.stages.presets import SHAPES, identity, workspace

UNKNOWN = "unknown"  # a licence that the hub knows by this name


@dataclass
class Provenance:
    """What a card says of a training run beyond what the run folder holds.

    stage: as in `presets.PRESETS`; config: resolved; where: the device, in words; rows: what was
    learnt from, by name; data: what came of reading --data, None for an embedded world.
    """

    stage: str
    config: object
    where: str
    rows: dict[str, int] = field(default_factory=dict)
    data: DataReport | None = None


def start_of(config, stage: str) -> str | Path | None:
    """The model that a stage starts from: a directory or a hub name; None for new weights."""
    model = config.model
    if model in SHAPES or (
        model is None and (stage == "pretrain" or (stage == "sft" and config.data))
    ):
        return None
    return model or workspace(config) / ("pretrain" if stage == "sft" else "sft") / "model"


def public_name(value: str | Path) -> str:
    """A model or a data set without the folders of this machine: the last two parts of a path."""
    text = str(value)
    if "://" in text:
        return "a server"  # its address may be nobody's business
    if isinstance(value, str) and not Path(text).exists() and HUB_NAME.fullmatch(text):
        return text
    return "/".join(part for part in Path(text).parts[-2:] if part != Path(text).anchor)


@dataclass
class Base:
    """What the card of the model that a run started from says of its licence and its origin."""

    licence: str | None = None
    origin: str | None = None

    @classmethod
    def of(cls, start: str | Path | None) -> Base:
        """Read the card beside a model. One without a card, or without a licence, is unknown."""
        if start is None:
            return cls()
        origin = None if Path(start).is_dir() else str(start)
        card = checkpoints.resolve(start) / "README.md"
        if not card.exists():
            return cls(None, origin)
        from huggingface_hub import ModelCard
        from yaml import YAMLError  # comes with huggingface_hub

        try:
            data = ModelCard.load(card).data
        except (ValueError, OSError, YAMLError):  # no YAML head, or a broken one
            return cls(None, origin)
        named = data.base_model[0] if isinstance(data.base_model, list) else data.base_model
        licence = None if data.license in (UNKNOWN, "other") else data.license
        return cls(licence, origin or named)


def licence_of(made: Provenance) -> tuple[str, str]:
    """(licence, why): that of the model it started from; never one that nobody gave."""
    start = start_of(made.config, made.stage)
    if start is not None:
        if (licence := Base.of(start).licence) is not None:
            return licence, f"That of the model it started from, {public_name(start)}."
        return UNKNOWN, (
            f"The card of {public_name(start)}, the model it started from, names none: look it up, "
            "and write it above, before you pass this model on."
        )
    if made.config.data:
        return UNKNOWN, (
            "The weights were new, so the data decide: write the licence above before you pass "
            "this model on."
        )
    return "apache-2.0", "New weights, trained on texts that this package generates."


def settings_of(made: Provenance) -> dict[str, object]:
    """The seed, and every setting that is not the field's own default; so a preset's are here."""
    config, default = made.config, {f.name: f.default for f in fields(made.config)}
    shown = {}
    for name in (name for name in identity(config) if name in default):
        value = getattr(config, name)
        if value is not None and (value != default[name] or name == "seed"):
            shown[name] = public_name(value) if name in PATHS else value
    return shown


def versions(*names: str) -> dict[str, str]:
    """Of Python and of these packages; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def seconds_of(timing: list[dict]) -> float:
    """Seconds of all steps; a stage names one figure, or its parts."""
    return sum(
        value for row in timing for name, value in row.items()
        if name == "seconds" or name.endswith("_seconds")
    )  # fmt: skip


def table(head: tuple[str, str], rows: dict[str, object]) -> str:
    """Two columns as Markdown; numbers with four digits."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in rows.items()}
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {value} |" for key, value in shown.items()])


def head_of(made: Provenance, folder: Path, summary: dict) -> object:
    """The card's YAML head, as huggingface_hub's ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    config, stage = made.config, made.stage
    name = f"{config.world if not config.data else short_name(config.data)}-{stage}"
    start = start_of(config, stage)
    adapter = (folder / "adapter_config.json").exists()
    more = {}
    if (origin := Base.of(start).origin) is not None:
        more["base_model"] = origin
        more["base_model_relation"] = "adapter" if adapter else "finetune"
    if config.data and public_name(config.data) == str(config.data):
        match = HUB_NAME.fullmatch(str(config.data))
        more["datasets"] = [match["name"]] if match and "/" in match["name"] else None
    figures = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    data = data_name(config)
    task = "text-classification" if stage == "reward_model" else "text-generation"
    if figures:
        more["model_name"] = name
        more["eval_results"] = [
            EvalResult(task_type=task, dataset_type=data, dataset_name=data,
                       metric_type=key, metric_name=key, metric_value=value)
            for key, value in figures.items()
        ]  # fmt: skip
    return ModelCardData(
        license=licence_of(made)[0], library_name="peft" if adapter else "transformers",
        pipeline_tag=task, tags=["rlhf-course", "rlhf", stage.replace("_", "-")], **more,
    )  # fmt: skip


def data_name(config) -> str:
    """The data set, or the embedded world."""
    return public_name(config.data) if config.data else f"rlhf-course-{config.world}"


def limits_of(made: Provenance, base: Base) -> list[str]:
    """What the model is not good for, as far as the stage, the data and its origin tell."""
    config, stage = made.config, made.stage
    said = [LIMITS[stage]]
    if stage == "ppo":
        said.append(LIMITS["learned reward" if not config.reward else "written reward"])
    said.append(LIMITS["own data"] if config.data else WORLDS[config.world][1])
    if base.origin:
        said.append(LIMITS["origin"].format(origin=base.origin))
    if base.origin and "gpt2" in base.origin:
        said.append(LIMITS["gpt2"])
    return said


def loading_of(made: Provenance, folder: Path) -> str:
    """How to load what stands in the folder."""
    adapter = (folder / "adapter_config.json").exists()
    if made.stage != "reward_model":
        plain = "text" if made.stage == "pretrain" else "policy"
        return LOADING["adapter" if adapter else plain]
    if adapter:
        return LOADING["reward adapter"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("reward_pooling", "last") != "last":
        return LOADING["pooled reward"].format(pooling=config["reward_pooling"])
    bias, pad, eos = (config.get(k) for k in ("reward_token_bias", "pad_token_id", "eos_token_id"))
    text = LOADING["reward"]
    if bias:
        text += LOADING["reward bias"].format(bias=bias)
    if pad is None or pad == eos:
        text += LOADING["reward pad"]
    return text


def data_of(made: Provenance) -> str:
    """Where the data are from, how many rows were used, and their licence."""
    config = made.config
    if config.data:
        said = f"`{public_name(config.data)}`."
        if made.data is not None:
            dropped = made.data.dropped.total()
            said += f" {made.data.read} rows were read and {dropped} of them left out."
        if made.data is not None and made.data.licence:
            said += f" It is read as {made.data.recipe}, whose licence is {made.data.licence}."
        else:
            said += " Its licence is not recorded here: look it up."
    else:
        seed = config.seed if config.world_seed is None else config.world_seed
        said = f"{WORLDS[config.world][0]} Generated by rlhf-course (`--world {config.world} "
        said += f"--size {config.size} --seed {seed}`); Apache-2.0."
    return f"{said}\n\n{table(('what', 'how many'), made.rows)}" if made.rows else said


def card_of(made: Provenance, folder: Path, metrics: list[dict], timing: list[dict], summary: dict):
    """The card of the model in `folder`, as huggingface_hub's ModelCard.

    metrics, timing: the run's rows; summary: what done.json will hold.
    """
    from huggingface_hub import ModelCard

    config, stage = made.config, made.stage
    # Those that the weights depend on.
    packages = {"rlhf-course": __version__}
    packages |= versions("torch", "transformers", "tokenizers", "peft")
    start = start_of(config, stage)
    base, (licence, why) = Base.of(start), licence_of(made)
    began = f"It started from `{public_name(start)}`" if start else "It started from new weights"
    if base.origin and str(start) != base.origin:
        began += f", which descends from [{base.origin}](https://huggingface.co/{base.origin})"
    if stage == "ppo":
        reward = config.reward or config.reward_model or "reward_model/model"
        began += f"; the reward is `{public_name(reward)}`"
    last = {k: v for k, v in metrics[-1].items() if k != "step" and k not in summary}
    parts = {
        TITLES[stage]: f"{STAGES[stage]} {began}.",
        "Recipe": f"`rlhf-course {stage.replace('_', '-')}` with the settings below; all others as "
                  f"they are by default.\n\n{table(('setting', 'value'), settings_of(made))}\n\n"
                  f"{table(('package', 'version'), packages)}\n\nDevice: {made.where}.  \n"
                  f"Training took {seconds_of(timing):.3g} seconds.",
        "Data": data_of(made),
        "Figures": f"{'Held out, at the end:' if summary else ''}\n\n"
                   f"{table(('figure', 'value'), summary) if summary else ''}\n\n"
                   f"The last of {len(metrics)} steps of training:\n\n"
                   f"{table(('figure', 'value'), last)}",
        "How to load it": loading_of(made, folder),
        "Limitations": "\n".join(f"- {each}" for each in limits_of(made, base)),
        "Licence": f"{licence}. {why}",
    }  # fmt: skip
    body = "\n\n".join(
        f"{'#' if i == 0 else '##'} {title}\n\n{text.strip()}"
        for i, (title, text) in enumerate(parts.items())
    )
    return ModelCard(f"---\n{head_of(made, folder, summary).to_yaml()}\n---\n\n{body}\n")


def write_card(made: Provenance, folder: Path, *facts) -> None:
    """Write README.md into the model's folder; the facts are the other ones of `card_of`."""
    card = card_of(made, folder, *facts)
    (folder / "README.md").write_text(str(card), encoding="utf-8", newline="\n")
    if card.data.license == UNKNOWN:
        console.print("the model card (model/README.md) names no licence: fill it in", style="dim")
