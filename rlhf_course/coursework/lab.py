"""The laboratory of the notebooks: base models, training runs, answers and figures.

    lab.model("sft")                                    a base model; what is missing is trained
    lab.train("ppo", own=[policy_loss], iterations=30)  the package's trainer with your function
    lab.train_many({"a": {...}, "b": {...}})            several runs side by side, cached
    lab.answers(model, tokenizer, prompts)              what a model says
    lab.show(figure, alt="…")                           a figure, with words for who cannot see it

Everything is kept in one folder that all chapters share, RLHF_COURSE_HOME or ~/.cache/rlhf-course,
so that a chapter can be opened first and a run is made once. With RLHF_COURSE_QUICK=1 the models
are tiny and hardly trained: that shows that a notebook works, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_course.coursework import jobs, recipes
from rlhf_course.coursework.expect import unwritten
from rlhf_course.coursework.jobs import home, size, workspace
from rlhf_course.coursework.own import fingerprint
from rlhf_course.coursework.substitute import substituted
from rlhf_course.coursework.workers import run_all
from rlhf_course.errors import ConfigError

__all__ = [
    "Trained", "answers", "ensure", "folder", "home", "load", "model", "show", "size", "train",
    "train_many", "workspace", "world",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`lab.quick`: True when RLHF_COURSE_QUICK is set, looked up at every use."""
    if name == "quick":
        return jobs.quick()
    raise AttributeError(name)


@dataclass
class Trained:
    """A finished run."""

    folder: Path
    """Its run folder: configuration, metrics, checkpoints and model."""

    @property
    def metrics(self) -> list[dict]:
        """One dictionary a step."""
        from rlhf_course.runs import read_metrics

        return read_metrics(self.folder)

    def curve(self, key: str) -> list[float]:
        """One metric over the steps that have it."""
        return [row[key] for row in self.metrics if row.get(key) is not None]

    @property
    def timing(self) -> list[dict]:
        """Seconds and rates, one dictionary a step."""
        from rlhf_course.runs import read_timing

        return read_timing(self.folder)

    @property
    def seconds(self) -> float:
        """How long the steps took, without what is between them."""
        parts = ("", "rollout_", "scoring_", "update_", "sync_")
        return sum(row.get(f"{part}seconds", 0.0) for row in self.timing for part in parts)

    def model(self) -> tuple[Any, Any]:
        """(model, tokenizer): a language model, or the ScalarModel of a reward-model run."""
        return load(self.folder / "model")


def load(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a run's model folder, on the best device there is, for scoring."""
    from rlhf_course.checkpoints import read_config
    from rlhf_course.device import choose_device
    from rlhf_course.huggingface import load_language_model, load_tokenizer
    from rlhf_course.reward_model import ScalarModel

    device = choose_device("auto", "auto", None)
    kind = (read_config(folder).get("architectures") or [""])[0]
    if kind.endswith("ForSequenceClassification"):
        model, tokenizer = ScalarModel.from_pretrained(folder), load_tokenizer(folder, str(folder))
    else:
        model, tokenizer = load_language_model(folder)
    return device.place(model).eval(), tokenizer


# ------------------------------------------------------------------------------------------- worlds


def world(name: str = "town"):
    """The embedded world that all chapters share: its people, prompts, texts and gold reward."""
    from rlhf_course.stages.setup import world_of

    return world_of(name, size(), recipes.SEED)


# ------------------------------------------------------------------------------------------- models


def model(stage: str, world: str = "town") -> tuple[Any, Any]:
    """(model, tokenizer) of a base stage: "pretrain", "sft", "reward_model" or "ppo".

    What is missing is trained first, with a progress bar: the whole town takes a few minutes, once.
    """
    return Trained(folder(stage, world)).model()


def folder(stage: str, world: str = "town") -> Path:
    """The run folder of a base stage, trained first where it is missing."""
    ensure(stage, world)
    return workspace(world) / stage


def ensure(stage: str, world: str = "town") -> None:
    """Train a base stage and all before it that are missing."""
    for name in (*jobs.entry(stage)[2], stage):
        jobs.run(name, workspace(world) / name, world, jobs.base(world, name))


def train(
    stage: str, name: str | None = None, world: str = "town", own: Sequence[Any] = (), **settings
) -> Trained:
    """Run a stage of the package, with your functions in the place of the package's.

    stage: pretrain, sft, comparisons, reward_model, ppo, ppo_ray or dpo. own: functions and classes
    of the exercises, told by their names. settings: fields of the stage's configuration
    (`rlhf-course STAGE --help` lists them); those left out have the course's values.
    With `own` it always runs; without, a run of the same name and settings is taken as it is. Where
    the session ended in the middle, the same call goes on from the last checkpoint.
    Raises ConfigError for a setting or a name that does not exist.
    """
    settings = {**jobs.base(world, stage), **settings}
    folder = jobs.place(world, name or f"own-{stage}")
    jobs.configuration(stage, folder, world, settings)  # wrong settings are told before all else
    for before in jobs.entry(stage)[2]:
        ensure(before, world)
    try:
        with substituted(own):
            jobs.run(stage, folder, world, settings, fingerprint(own))
    except NotImplementedError as error:
        if not own or not unwritten(error):
            raise
        raise ConfigError(
            "one of your functions is not written yet, so nothing can be trained with it. "
            "Solve the exercises above first: check(…) says how far they are."
        ) from error
    return Trained(folder)


def train_many(
    runs: Mapping[str, Mapping[str, Any]], workers: int | None = None, world: str = "town"
) -> dict[str, Trained]:
    """Several runs side by side, one process and one thread each: what small models like best.

    runs: name -> {"stage": …, settings}; a run may name its own "world". The package's functions
    are used. What was run before with the same settings is taken as it is.
    workers: processes at a time, default one a core (in quick mode: none but this one).
    """
    asked_for = []
    for name, asked in runs.items():
        settings = dict(asked)
        stage, where = settings.pop("stage", "ppo"), settings.pop("world", world)
        settings = {**jobs.base(where, stage), **settings}
        asked_for.append((stage, jobs.place(where, name), where, settings))
        jobs.configuration(*asked_for[-1])  # wrong settings are told before all else
    for stage, _, where, _ in asked_for:
        for before in jobs.entry(stage)[2]:
            ensure(before, where)
    waiting = [job for job in asked_for if not jobs.is_done(*job)]
    if jobs.quick() and workers is None:  # over before another process has started
        for job in waiting:
            jobs.run(*job)
    elif waiting:
        run_all(waiting, workers)
    return {name: Trained(job[1]) for name, job in zip(runs, asked_for, strict=True)}


# ------------------------------------------------------------------------------ answers and figures


def answers(
    model, tokenizer, prompts: Sequence[Any], seed: int = 0, temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> list[tuple[str, bool]]:  # fmt: skip
    """One answer to each prompt: (text, whether it ended by itself).

    prompts: texts, or Prompts of a world. temperature 0 takes the likeliest token each time.
    max_new_tokens: default 40, less where the context ends.
    """
    from rlhf_course.sampling import generate
    from rlhf_course.sft import encode_prompt
    from rlhf_course.stages.rollouts import decode_answers
    from rlhf_course.training import torch_generator

    if isinstance(prompts, str):
        raise ConfigError("prompts is a list: write [prompt] for a single one.")
    if not prompts:
        return []
    texts = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
    ids = [encode_prompt(tokenizer, text) for text in texts]
    room = model.context - max(map(len, ids), default=0)
    longest = min(40 if max_new_tokens is None else max_new_tokens, room)
    device = next(model.parameters()).device
    out = generate(
        model, ids, longest, tokenizer.eos_token_id, temperature, batch_size=1024,
        generator=torch_generator(seed, "lab answers", device=device),
    )  # fmt: skip
    return list(zip(decode_answers(tokenizer, out), out.finished, strict=True))


def show(figure, alt: str) -> None:
    """Display a matplotlib figure with a text for those who cannot see it, then let it go."""
    import io

    from IPython.display import display
    from matplotlib import pyplot
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, bbox_inches="tight")
    # A palette takes a third of the bytes, and lines and text show no difference.
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    display(
        {"image/png": small.getvalue(), "text/plain": alt},
        raw=True, metadata={"image/png": {"alt": alt}},
    )  # fmt: skip
    pyplot.close(figure)  # a figure made by pyplot would be shown once more, without the text
