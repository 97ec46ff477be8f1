"""What the stages load before they train: worlds, models, and the result of the stage before."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from rlhf_course import checkpoints
from rlhf_course.adapters import LoRA
from rlhf_course.device import Device, choose_device, keep_freed_memory
from rlhf_course.errors import ModelError
from rlhf_course.files import replacing
from rlhf_course.gpt import GPT
from rlhf_course.huggingface import HuggingFaceLM, load_fitted, load_tokenizer
from rlhf_course.pretrained_model import PLAIN, WeightFormat
from rlhf_course.pretrained_tokenizer import begins_with_bos, tokens_written
from rlhf_course.progress import console
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import Run, read_metrics, read_timing
from rlhf_course.sft import PLAIN_TEMPLATE
from rlhf_course.stages.cards import Provenance, write_card
from rlhf_course.stages.presets import SHAPES, model_shape, workspace
from rlhf_course.stages.profiles import told
from rlhf_course.training import derive_seed
from rlhf_course.world import make_world


@lru_cache(maxsize=4)
def world_of(name: str, size: str, seed: int):
    """The embedded world, made once a process."""
    return make_world(name, size, seed)


def world_for(config):
    """The embedded world that a stage is to use."""
    seed = config.seed if config.world_seed is None else config.world_seed
    return world_of(config.world, config.size, seed)


def device_of(config) -> Device:
    """The device that the configuration asks for; announced when a stage begins."""
    device = choose_device(config.device, config.dtype, config.threads)
    if device.device.type == "cpu":
        keep_freed_memory()
    return device


def announce(stage: str, config, device: Device) -> None:
    """One line saying what begins, where, and into which folder."""
    console.print(f"[bold]{stage}[/bold]  {device}  →  {config.out}", soft_wrap=True)
    if getattr(config, "profile", None) is not None:
        console.print(told(config, device), soft_wrap=True, markup=False)


def new_model(size: str, tokenizer, context: int, seed: int) -> GPT:
    """A GPT of this size with fresh weights, a function of the seed alone."""
    console.print(f"a new model of size {size}, not trained yet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return GPT(model_shape(size, len(tokenizer), context))


def before(config, stage: str) -> Path:
    """The model of an earlier stage that stands beside this stage's folder.

    Raises ModelError saying how to make it when it is not there.
    """
    model = workspace(config) / stage / "model"
    if not (model / "config.json").exists():
        command = stage.replace("_", "-")
        flag = "--reward-model" if stage == "reward_model" else "--model"
        raise ModelError(
            f"{model}: not there; this stage starts from it. Run `rlhf-course {command}` first, "
            f"with the same --world (or --data), --size and --seed, or name a model with {flag}."
        )
    return model


def load_policy(
    name_or_dir, device: Device, how: WeightFormat = PLAIN
) -> tuple[GPT | HuggingFaceLM, object]:
    """(language model on the device, tokenizer) from a directory or hub name."""
    if str(name_or_dir) in SHAPES:
        raise ModelError(
            f"--model {name_or_dir}: a size names a new model, without weights, and this stage "
            "needs a trained one. Give a directory or a hub name."
        )
    model, tokenizer = load_fitted(name_or_dir, how)
    return device.place(model), tokenizer


def plain_template(tokenizer) -> str:
    """The chat template that a base model's tokenizer gets, which has none: `sft.PLAIN_TEMPLATE`,
    behind BOS where the model's texts are."""
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + PLAIN_TEMPLATE


def load_reward_model(
    name_or_dir, tokenizer, device: Device, how: WeightFormat = PLAIN
) -> ScalarModel:
    """A reward model on the device, for scoring only; `tokenizer` is the policy's.

    Raises ModelError when its tokenizer is another one: it would read other words.
    """
    model = ScalarModel.from_pretrained(name_or_dir, how)
    own = load_tokenizer(checkpoints.resolve(name_or_dir), str(name_or_dir))
    require_one_tokenizer(own, tokenizer, f"{name_or_dir}: the reward model", "the policy")
    tokens_written(own, model.backbone.vocab_size, str(name_or_dir))
    return frozen(device.place(model))


def start_critic(
    reward_model: ScalarModel | None, policy: nn.Module, seed: int, lora: LoRA | None = None
) -> ScalarModel:
    """It starts as the reward model, or, where a function gives the score, as the policy. With
    `lora` an adapter over the reward model's own backbone, or over a copy of the policy's."""
    if reward_model is not None and lora is not None:
        return reward_model.adapter_critic(lora, derive_seed(seed, "adapter", "critic"))
    if reward_model is not None:
        return reward_model.as_critic()
    critic = ScalarModel.from_language_model(policy, "last", seed)
    nn.init.zeros_(critic.head.weight)
    if lora is not None:
        critic.backbone.adapt(lora, derive_seed(seed, "adapter", "critic"))
    return critic


def require_one_tokenizer(one, other, who: str, whose: str) -> None:
    """Raise ModelError unless both write the same tokens; `who` and `whose` name their models."""
    if one.get_vocab() != other.get_vocab():
        raise ModelError(
            f"{who} has another tokenizer than {whose} ({len(one)} tokens, {len(other)} there), so "
            "one would read other words than the other wrote. Take models of one origin."
        )


def frozen(model: nn.Module) -> nn.Module:
    """The model for scoring only."""
    return model.eval().requires_grad_(False)


def complete(run: Run) -> bool:
    """True, and said, when the stage was run to its end before."""
    if run.finished:
        console.print(f"{run.path}: complete already; --overwrite repeats it", soft_wrap=True)
    return run.finished


def conclude(
    run: Run, made: Provenance, export: Callable[[Path], None], summary: dict, kl_target=None
) -> None:
    """Draw the stage's curves, write its model with a card, and mark the run as done."""
    from rlhf_course.plots import stage_curves

    stage, metrics = made.stage, read_metrics(run.path)

    def export_with_card(folder: Path) -> None:
        export(folder)
        write_card(made, folder, metrics, read_timing(run.path), summary)

    figure = stage_curves(stage, metrics, kl_target)
    with replacing(run.path / "plots" / f"{stage}.png") as part:
        figure.savefig(part, format="png", dpi=110)
    run.finish(export_with_card, summary)
