"""The whole course in one command: GPT → SFT → reward model → PPO-ptx → report.

    rlhf-course demo                                the town, small, seed 0
    rlhf-course demo --world reviews --seed 1

Every stage is a run folder; a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from rlhf_course.evaluation import best_of_n, best_of_n_kl
from rlhf_course.progress import console
from rlhf_course.report import build_report, summary_table
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import read_json, read_metrics, write_json
from rlhf_course.sampling import generate
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.bars import bars_of
from rlhf_course.stages.cards import versions
from rlhf_course.stages.comparisons import comparisons
from rlhf_course.stages.corpus import Corpus
from rlhf_course.stages.evaluate import WINDOW, Judged, figures
from rlhf_course.stages.ppo import ppo
from rlhf_course.stages.presets import PRESETS, workspace
from rlhf_course.stages.pretrain import perplexity_of, pretrain
from rlhf_course.stages.reward_model import train_reward_model
from rlhf_course.stages.rewards import model_scores
from rlhf_course.stages.rollouts import Task, as_tensors, in_parts
from rlhf_course.stages.settings import (
    ComparisonsConfig,
    DemoConfig,
    EvaluateConfig,
    PPOConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf_course.stages.setup import device_of, frozen, load_policy, world_of
from rlhf_course.stages.sft import sft
from rlhf_course.training import torch_generator

# The figures depend on them.
PACKAGES = ("rlhf-course", "torch", "transformers", "tokenizers", "datasets", "numpy")

# The main run's settings, changed; the names are those of the run folders.
ABLATIONS: dict[str, dict] = {
    "ppo_no_ptx": {"ptx_coef": 0.0},
    "ppo_no_kl": {"kl_coef": 0.0, "iterations": 120},
    "ppo_no_kl_no_ptx": {"kl_coef": 0.0, "ptx_coef": 0.0, "iterations": 120},
    "ppo_sequence": {"mdp": "sequence"},
}

COMMANDS = {
    pretrain: "pretrain", sft: "sft", comparisons: "comparisons", ppo: "ppo",
    train_reward_model: "reward-model",
}  # fmt: skip


def stages_of(config: DemoConfig, folder: Path) -> dict[str, tuple]:
    """Run folder's name -> (the stage's function, its configuration), in order."""
    shared = {
        "world": config.world, "size": config.size, "seed": config.seed, "device": config.device,
        "dtype": config.dtype, "threads": config.threads, "overwrite": config.overwrite,
        "track": config.track,
    }  # fmt: skip

    def make(kind, name: str, **changes):
        return kind(**shared, out=folder / name, **changes)

    out = {
        "pretrain": (pretrain, make(PretrainConfig, "pretrain")),
        "sft": (sft, make(SFTConfig, "sft")),
        "comparisons": (comparisons, make(ComparisonsConfig, "comparisons", checkpoint_every=1)),
        "reward_model": (train_reward_model, make(RewardModelConfig, "reward_model")),
    }
    if config.compare_poolings:
        main = PRESETS[config.world, config.size]["reward_model"]["pooling"]
        other = "mean" if main == "last" else "last"
        name = f"reward_model_{other}"
        out[name] = (train_reward_model, make(RewardModelConfig, name, pooling=other))
    out["ppo"] = (ppo, make(PPOConfig, "ppo", checkpoint_every=5))
    ablations = config.ablations
    if ablations is None:
        ablations = tuple(ABLATIONS)[: 1 if config.world == "town" else 3]
    for name in ablations:
        out[name] = (ppo, make(PPOConfig, name, checkpoint_every=5, **ABLATIONS[name]))
    return out


def command_of(stage: str, config) -> str:
    """The command that runs one stage by itself: every setting that is not a default.

    config: as `stages_of` makes it, before the stage has filled in what was left unset.
    """
    words = ["rlhf-course", stage]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != "overwrite" and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return " ".join(words)


def peak_memory_gb() -> float | None:
    """Most memory that this process held, 10^9 bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def samples_of(judged: dict[str, Judged], each: int = 5) -> list[dict]:
    """A few prompts of every group with every policy's answer."""
    first = next(iter(judged.values()))
    out = []
    for group in dict.fromkeys(first.groups):
        places = [i for i, g in enumerate(first.groups) if g == group]
        for i in places[:: max(len(places) // each, 1)][:each]:
            answers = {
                name: {"text": j.answers.texts[i], "gold": j.gold[i], "verdict": j.verdicts[i]}
                for name, j in judged.items()
            }
            prompt = first.answers.tasks[i].text
            out.append({"group": group, "prompt": prompt, "answers": answers})
    return out


@torch.no_grad()
def best_of(policy, reward, tokenizer, world, config: EvaluateConfig, most: int = 64) -> dict:
    """Gold and proxy of the best of n = 1, 2, 4 … answers by the reward model (Gao et al. 2023)."""
    prompts = [p for group in world.evaluation_prompts(config.split).values() for p in group]
    prompts = prompts[:: max(len(prompts) // 100, 1)][:100]
    tasks = [Task(p.text, encode_prompt(tokenizer, p.text), source=p)
             for p in prompts for _ in range(most)]  # fmt: skip
    device = next(policy.parameters()).device
    longest = PRESETS[config.world, config.size]["ppo"]["max_new_tokens"]
    out = generate(
        policy, [t.tokens for t in tasks], longest, tokenizer.eos_token_id,
        generator=torch_generator(config.seed, "best of n", device=device), batch_size=1024,
    )  # fmt: skip
    answers = as_tensors(tasks, out, tokenizer, device, policy.context)
    (proxy,) = in_parts(lambda *part: (model_scores(reward, *part),), 512, answers.tokens,
                        answers.prompt_lengths, answers.response_lengths)  # fmt: skip
    gold = torch.tensor([world.utility(t.source, text, end) for t, text, end
                         in zip(tasks, answers.texts, out.finished, strict=True)])  # fmt: skip
    proxy, gold = proxy.cpu().view(-1, most), gold.view(-1, most)
    ns = [2**k for k in range(most.bit_length())]
    return {
        "n": ns,
        "kl": [best_of_n_kl(n) for n in ns],
        "gold": [float(best_of_n(proxy, gold, n)) for n in ns],
        "proxy": [float(best_of_n(proxy, proxy, n)) for n in ns],
    }


def evaluate_all(config: DemoConfig, folder: Path, stages: dict) -> dict:
    """What evaluation.json holds: every policy's figures, samples, reward models, bars."""
    judge_config = EvaluateConfig(world=config.world, size=config.size, seed=config.seed)
    device = device_of(config)
    world = world_of(config.world, config.size, config.seed)
    corpus = Corpus(world.documents("validation"), world.tokenizer, WINDOW)
    base, tokenizer = load_policy(folder / "sft" / "model", device)
    reward = frozen(device.place(ScalarModel.from_pretrained(folder / "reward_model" / "model")))
    pretrained, _ = load_policy(folder / "pretrain" / "model", device)
    policies, judged = {}, {}
    names = ["sft", *(name for name in stages if name.startswith("ppo"))]
    for name in names:
        console.print(f"evaluating {name}")
        policy, _ = load_policy(folder / name / "model", device)
        policies[name], judged[name] = figures(
            frozen(policy), tokenizer, world, judge_config, corpus, judged.get("sft"),
            None if name == "sft" else base, reward,
        )  # fmt: skip
    demonstrations = world.demonstrations()[:1000]
    gold = [world.utility(d.prompt, d.response, True) for d in demonstrations]
    main = stages["ppo"][1]
    kl = [row["kl"] for row in read_metrics(folder / "ppo")][-20:]
    out = {
        "pretrained_perplexity": perplexity_of(pretrained, corpus),
        "demonstrations_gold": sum(gold) / len(gold),
        "policies": policies,
        "reward_models": {
            stages[name][1].pooling: read_json(folder / name / "done.json")
            for name in stages if name.startswith("reward_model")
        },
        "kl_target": main.kl_target,
        "kl_mean_last_20": sum(kl) / len(kl),
        "best_of_n": best_of(base, reward, tokenizer, world, judge_config),
        "samples": samples_of({name: judged[name] for name in ("sft", "ppo")}),
    }  # fmt: skip
    # The bars are for the size they were set for; tiny is a matter of seconds and learns little.
    return out | {"bars": bars_of(config.world, out) if config.size == "small" else []}


def demo(config: DemoConfig) -> Path:
    """Run every stage, evaluate, and write report.html and report.json; returns the former."""
    folder = Path(config.out) if config.out else workspace(config)
    stages = stages_of(config, folder)
    commands = [command_of(COMMANDS[stage], c) for stage, c in stages.values()]
    clock = folder / "seconds.json"
    seconds: dict[str, float] = {}
    if clock.exists() and not config.overwrite:
        seconds = read_json(clock)
    device = device_of(config)
    for name, (stage, stage_config) in stages.items():
        began, already = time.perf_counter(), (folder / name / "done.json").exists()
        stage(stage_config)
        if not already or config.overwrite:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            write_json(clock, seconds)
    began = time.perf_counter()
    evaluation = {
        "world": config.world, "size": config.size, "seed": config.seed, "device": str(device),
        "versions": {"platform": platform.platform(), **versions(*PACKAGES)}, "commands": commands,
    } | evaluate_all(config, folder, stages)  # fmt: skip
    seconds["evaluation"] = time.perf_counter() - began
    evaluation |= {"seconds": seconds, "memory_gb": peak_memory_gb()}
    write_json(folder / "evaluation.json", evaluation)
    write_json(folder / "report.json", {k: v for k, v in evaluation.items() if k != "samples"})
    report = build_report(folder)
    console.print(summary_table(evaluation))
    console.print(f"report: {report}   metrics: tensorboard --logdir {folder}", soft_wrap=True)
    return report
