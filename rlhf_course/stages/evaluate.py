"""Evaluation: what a policy says to people it was never trained on, and what it forgot.

rlhf-course evaluate --model runs/…/ppo/model --baseline runs/…/sft/model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import torch
from rich.table import Table
from torch import nn

from rlhf_course.evaluation import distinct_n, entropy, honesty_table, win_rate
from rlhf_course.files import require_writable, write_json
from rlhf_course.progress import console
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import action_logprobs
from rlhf_course.sampling import generate
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus
from rlhf_course.stages.presets import PRESETS, identity, workspace
from rlhf_course.stages.pretrain import perplexity_of
from rlhf_course.stages.rewards import model_scores
from rlhf_course.stages.rollouts import Answers, Task, as_tensors, in_parts
from rlhf_course.stages.settings import EvaluateConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    device_of,
    frozen,
    load_policy,
    load_reward_model,
    require_one_tokenizer,
    world_for,
)
from rlhf_course.training import torch_generator

WINDOW = 48  # tokens in a row when perplexity is measured; the same for every model


@dataclass
class Judged:
    """A policy's answers to the evaluation prompts, and what they are worth."""

    answers: Answers
    gold: list[float]
    verdicts: list[str]
    groups: list[str]

    def of(self, group: str, values: list) -> list:
        """The entries of one group."""
        return [v for v, g in zip(values, self.groups, strict=True) if g == group]


def judge(model: nn.Module, tokenizer, world, config: EvaluateConfig) -> Judged:
    """Answer every evaluation prompt once, with the same seed for every policy."""
    prompts = world.evaluation_prompts(config.split)
    pairs = [(group, p) for group, ps in prompts.items() for p in ps]
    tasks = [Task(p.text, encode_prompt(tokenizer, p.text), source=p) for _, p in pairs]
    device = next(model.parameters()).device
    longest = PRESETS[config.world, config.size]["ppo"]["max_new_tokens"]
    out = generate(
        model, [t.tokens for t in tasks], longest, tokenizer.eos_token_id, config.temperature,
        generator=torch_generator(config.seed, "evaluate", device=device), batch_size=1024,
    )  # fmt: skip
    answers = as_tensors(tasks, out, tokenizer, device, model.context)
    said = list(zip(tasks, answers.texts, out.finished, strict=True))
    return Judged(
        answers,
        [world.utility(t.source, text, end) for t, text, end in said],
        [world.verdict(t.source, text, end) for t, text, end in said],
        [group for group, _ in pairs],
    )


@torch.no_grad()
def kl_to(
    model: nn.Module, reference: nn.Module, answers: Answers, temperature: float, size: int = 256
) -> float:
    """KL(model || reference), mean over answers sampled from the model of the k1 sum, nats; `size`
    answers in a forward pass."""

    def difference(tokens, mask):
        mine, _ = action_logprobs(model, tokens, mask, temperature or 1.0)
        theirs, _ = action_logprobs(reference, tokens, mask, temperature or 1.0)
        return ((mine - theirs).sum(dim=1),)

    (kl,) = in_parts(difference, size, answers.tokens, answers.mask)
    return kl.mean().item()


def figures(
    model: nn.Module,
    tokenizer,
    world,
    config: EvaluateConfig,
    corpus: Corpus,
    baseline: Judged | None = None,
    reference: nn.Module | None = None,
    reward: ScalarModel | None = None,
) -> tuple[dict, Judged]:
    """All figures of one policy as plain JSON, and its judged answers.

    baseline: the answers to win against; reference: the policy to measure the KL to; reward: gives
    the proxy reward.
    """
    judged = judge(model, tokenizer, world, config)
    answers = judged.answers
    out = {
        "gold": mean(judged.gold),
        "shares": honesty_table(zip(judged.groups, judged.verdicts, strict=True), world.verdicts),
        "perplexity": perplexity_of(model, corpus),
        "length": answers.response_lengths.float().mean().item(),
        "eos_rate": answers.finished.float().mean().item(),
        "distinct_2": distinct_n(answers.texts, 2),
        "answer_entropy_bits": entropy(answers.texts),
        "groups": {},
    }
    phrasings = list(world.phrasings(answers.texts).elements())
    if phrasings:
        out["phrasing_entropy_bits"] = entropy(phrasings)
    if reference is not None:
        out["kl"] = kl_to(model, reference, answers, config.temperature)
    if reward is not None:
        (scores,) = in_parts(
            lambda *part: (model_scores(reward, *part),), 256,
            answers.tokens, answers.prompt_lengths, answers.response_lengths,
        )  # fmt: skip
        out["proxy"] = scores.mean().item()
    for group in dict.fromkeys(judged.groups):
        gold = judged.of(group, judged.gold)
        entry = {"gold": mean(gold), "prompts": len(gold)}
        if baseline is not None:
            win = win_rate(gold, baseline.of(group, baseline.gold))
            entry |= {"win_rate": win.rate, "win_low": win.low, "win_high": win.high}
        out["groups"][group] = entry
    return out, judged


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate one policy beside a baseline; writes figures.json and returns its path."""
    if config.out is None:
        config.out = workspace(config) / "evaluate"
    check_settings(config)
    require_writable(Path(config.out))
    device = device_of(config)
    announce("evaluate", config, device)
    world = world_for(config)
    baseline, tokenizer = load_policy(config.baseline or before(config, "sft"), device)
    name = config.model or before(config, "ppo")
    policy, own = load_policy(name, device)
    require_one_tokenizer(own, tokenizer, f"{name}: the policy", "the baseline")
    corpus = Corpus(world.documents("validation"), tokenizer, WINDOW)
    reward = None
    folder = config.reward_model or workspace(config) / "reward_model" / "model"
    if config.reward_model or Path(folder).is_dir():
        reward = load_reward_model(folder, tokenizer, device)
    base, judged = figures(frozen(baseline), tokenizer, world, config, corpus, reward=reward)
    mine, _ = figures(frozen(policy), tokenizer, world, config, corpus, judged, baseline, reward)
    path = Path(config.out) / "figures.json"
    write_json(path, {"config": identity(config), "policy": mine, "baseline": base})
    table = Table(title=f"{config.world}, {config.split}")
    table.add_column("figure")
    table.add_column("baseline", justify="right")
    table.add_column("policy", justify="right")
    for name, value in flat(mine).items():
        before_it = flat(base).get(name)
        table.add_row(name, "" if before_it is None else f"{before_it:.3f}", f"{value:.3f}")
    console.print(table)
    return path


def flat(tree: dict, prefix: str = "") -> dict[str, float]:
    """Nested figures as one level: {"shares": {"known": {"true": …}}} -> "shares known true"."""
    out: dict[str, float] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return out
