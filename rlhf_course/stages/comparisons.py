"""Comparisons: the SFT model answers, the world's labeler ranks.

    rlhf-course comparisons --world town --size small

Of the K answers to a prompt most are sampled from the policy at temperature 1, some at 1.4, and one
is injected by the world, so that the reward model has seen what a policy under pressure may try.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

from rlhf_course.errors import DataError
from rlhf_course.files import replacing
from rlhf_course.gpt import generate
from rlhf_course.runs import Run, State
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.presets import PRESETS, identity, resolve
from rlhf_course.stages.rollouts import decode_answers
from rlhf_course.stages.settings import ComparisonsConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    device_of,
    frozen,
    load_policy,
    world_for,
)
from rlhf_course.training import derive_seed, torch_generator
from rlhf_course.world import Comparison, Prompt

CHUNK = 512  # prompts answered at once, and written as one file


def answer(
    model, tokenizer, prompts: list[Prompt], max_new_tokens: int, generator, temperature=1.0
) -> tuple[list[str], list[bool]]:
    """One sampled answer to each prompt: texts, and whether each ended."""
    ids = [encode_prompt(tokenizer, p.text) for p in prompts]
    out = generate(
        model, ids, max_new_tokens, tokenizer.eos_token_id, temperature, generator=generator
    )
    return decode_answers(tokenizer, out), out.finished


def compare(
    config: ComparisonsConfig, model, tokenizer, world, audience: str, chunk: int, count: int
) -> list[Comparison]:
    """The ranked answers to one chunk of `count` prompts about an audience of the world."""
    purpose = (audience, chunk)
    prompts = world.prompts(audience, count, derive_seed(config.seed, *purpose))
    generator = torch_generator(config.seed, *purpose, "answers", device=_device(model))
    longest = PRESETS[config.world, config.size]["ppo"]["max_new_tokens"]
    hot = config.hot_answers
    temperatures = [1.0] * (config.answers - 1 - hot) + [1.4] * hot
    drawn = [answer(model, tokenizer, prompts, longest, generator, t) for t in temperatures]
    rng = random.Random(derive_seed(config.seed, *purpose, "labels"))
    out = []
    for i, prompt in enumerate(prompts):
        texts = [texts[i] for texts, _ in drawn]
        ended = [finished[i] for _, finished in drawn]
        text, finished = world.inject(prompt, texts, rng)
        comparison = world.rank(prompt, [*texts, text], [*ended, finished], rng)
        if len(comparison.responses) > 1:  # all K alike: nothing to compare
            out.append(comparison)
    return out


def _device(model):
    return next(model.parameters()).device


def comparisons(config: ComparisonsConfig) -> Path:
    """Run (or finish) the stage; returns the folder with comparisons.jsonl and heldout.jsonl."""
    check_settings(resolve(config, "comparisons"))
    device = device_of(config)
    announce("comparisons", config, device)
    # Held-out comparisons are about people of their own: a label tells a fact about a stranger.
    parts = [
        (name, audience, chunk, min(CHUNK, total - chunk * CHUNK))
        for name, audience, total in (
            ("comparisons", "comparisons", config.prompts),
            ("heldout", "validation", config.heldout),
        )
        for chunk in range(-(-total // CHUNK))
    ]
    run = Run(config.out, identity(config), len(parts), "comparisons",
              config.overwrite, 1, config.track)  # fmt: skip
    if complete(run):
        return run.path
    model, tokenizer = load_policy(config.model or before(config, "sft"), device)
    world = world_for(config)
    files = run.path / "chunks"
    with run:
        for step in run.steps(State({}, {})):
            name, audience, chunk, count = parts[step]
            made = compare(config, frozen(model), tokenizer, world, audience, chunk, count)
            with replacing(files / f"{name}-{chunk:04d}.jsonl") as part:
                part.write_text("".join(json.dumps(asdict(c)) + "\n" for c in made))
            utilities = [u for c in made for u in c.utilities]
            mean = sum(utilities) / max(len(utilities), 1)
            run.log(step, {"utility": mean, "prompts": len(made)})
        counts = {}
        for name in ("comparisons", "heldout"):
            chunks = sorted(files.glob(f"{name}-*.jsonl"))
            text = "".join(chunk.read_text(encoding="utf-8") for chunk in chunks)
            counts[name] = text.count("\n")
            if not text:
                raise DataError(
                    f"none of the prompts for {name} got answers that differ: nothing is left to "
                    "rank. The model repeats itself; train it longer, or give more --prompts."
                )
            with replacing(run.path / f"{name}.jsonl") as part:
                part.write_text(text, encoding="utf-8")
        run.finish(None, counts)
    return run.path


def read_comparisons_run(path: Path) -> list[Comparison]:
    """The comparisons of a file that this stage wrote."""
    out = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = row.pop("prompt")
        prompt = Prompt(prompt["text"], prompt["group"], tuple(prompt["key"]))
        out.append(
            Comparison(prompt, *(tuple(row[k]) for k in ("responses", "finished", "utilities")))
        )
    return out
