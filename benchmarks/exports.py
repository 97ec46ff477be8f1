"""Do the real packages take what `rlhf-course export` writes?

    python benchmarks/exports.py trl          in an environment with trl==1.12.0
    python benchmarks/exports.py openrlhf     with openrlhf==0.11.2 (deepspeed, ray and vllm too)
    python benchmarks/exports.py verl         with verl==0.9.1 (hydra-core, tensordict, torchdata …)

No GPU is needed. For every stage, on a tiny town: the arguments of run.sh are parsed by the
package's own parser, the data are loaded by its own classes, and what these make of a row is
compared with the tokens and the mask that our own stage learns from. TRL also makes one step on the
CPU. OpenRLHF imports flash-attention, which needs a CUDA compiler; where it is missing, an empty
module takes its place, since only its name is needed here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import os
import re
import runpy
import shlex
import sys
import types
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from rlhf_course import cli
from rlhf_course.export.command import export
from rlhf_course.export.settings import ExportConfig
from rlhf_course.export.source import Source, read_source
from rlhf_course.progress import console
from rlhf_course.sft import encode_dialogue, encode_prompt
from rlhf_course.training import learning_rate

TINY = ["--size", "tiny", "--threads", "1"]
RUNS = {
    "pretrain": ["pretrain"],
    "sft": ["sft"],
    "comparisons": ["comparisons", "--heldout", "64"],
    "reward_model": ["reward-model", "--warmup", "2"],
    "dpo": ["dpo", "--steps", "8"],
    "ppo": ["ppo", "--iterations", "2", "--minibatch", "16"],
}
STAGES = {"trl": ("sft", "reward_model", "dpo", "ppo"), "verl": ("sft", "ppo"),
          "openrlhf": ("sft", "reward_model", "dpo", "ppo")}  # fmt: skip
LIMIT = 200  # rows that are compared


def words_of(folder: Path) -> list[str]:
    """The command in run.sh, as the program behind it receives it."""
    lines = (folder / "run.sh").read_text(encoding="utf-8").replace("\\\n", "")
    return shlex.split(lines.strip().splitlines()[-1])


def ours(source: Source, row, answer: str | None = None) -> tuple[list[int], list[int]]:
    """(tokens, mask) of a row as our own stage reads it: 1 where something is learnt."""
    tokens, start = encode_dialogue(source.tokenizer, row.prompt, answer or row.response)
    return tokens, [0] * start + [1] * (len(tokens) - start)


def same(pairs) -> str:
    """How many pairs are equal."""
    found = [a == b for a, b in pairs]
    return f"{sum(found)} of {len(found)} rows as ours"


# --- TRL ----------------------------------------------------------------------------------------


def schedule_error(args, config, steps: int) -> float:
    """Largest difference between TRL's learning rate and ours, as a share of the peak."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    theirs = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_steps), steps,
                           args.lr_scheduler_kwargs)  # fmt: skip
    worst = 0.0
    for step in range(steps):
        mine = learning_rate(config.lr, step, steps, config.schedule, config.warmup,
                             config.lr_floor)  # fmt: skip
        worst = max(worst, abs(mine - optimizer.param_groups[0]["lr"]) / config.lr)
        optimizer.step()
        theirs.step()
    return worst


def trl_supervised(source: Source, words: list[str]) -> dict[str, str]:
    """Parse, train one step by the package's own script, and look into what the trainer read."""
    script = importlib.import_module(f"trl.scripts.{words[1]}")
    parse = script.make_parser().parse_args_and_config
    # Without a GPU bf16 is refused unless the CPU is asked for; nothing else is added here.
    _, asked, *_ = parse([*words[2:], "--use_cpu", "True"], fail_with_unknown_args=True)
    off = schedule_error(asked, source.config, asked.max_steps)
    out = {"arguments": f"{len(words) - 2} words parsed",
           "learning rate": f"at most {off:.1%} of the peak off ours"}  # fmt: skip
    kind = type(asked).__name__.replace("Config", "Trainer")
    trainer_class, seen = getattr(importlib.import_module("trl"), kind), []
    train = trainer_class.train
    trainer_class.train = lambda self, *rest: (seen.append(self), train(self, *rest))[1]
    short = ["--max_steps", "1", "--use_cpu", "True", "--bf16", "False", "--report_to", "none",
             "--save_strategy", "no", "--eval_strategy", "no"]  # fmt: skip
    parsed = parse([*words[2:], *short], fail_with_unknown_args=True)
    script.main(*parsed)
    trainer_class.train = train
    (trainer,) = seen
    logged = [row for row in trainer.state.log_history if "loss" in row]
    out["one step"] = f"loss {logged[0]['loss']:.3f}"
    rows = trainer.train_dataset.select(range(min(LIMIT, len(source.train))))
    if source.stage == "sft":
        pairs = [((r["input_ids"], [int(x != -100) for x in r["labels"]]), ours(source, row))
                 for r, row in zip(rows, source.train, strict=False)]  # fmt: skip
    else:
        # The trainer may put the rows into another order: they are compared as a set.
        known = {tuple(ours(source, row, text)[0]) for row in source.train
                 for text in (row.chosen, row.rejected)}  # fmt: skip
        pairs = [(tuple(tokens) in known, True) for r in rows for tokens in _pair_of(r)]
    out["tokens"] = same(pairs)
    return out


def _pair_of(row: dict) -> tuple[list[int], list[int]]:
    if "chosen_ids" in row:
        start = row.get("prompt_ids") or []
        return start + row["chosen_ids"], start + row["rejected_ids"]
    names = ("chosen_input_ids", "rejected_input_ids")
    start = row.get("prompt_input_ids") or []
    return tuple(start + row[name] for name in names)


def trl_ppo(source: Source, words: list[str]) -> dict[str, str]:
    """The script that export writes beside run.sh, one rollout on the CPU."""
    from transformers import HfArgumentParser
    from trl import ModelConfig, ScriptArguments
    from trl.experimental.ppo import PPOConfig

    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    parser.parse_args_into_dataclasses([*words[2:], "--use_cpu", "True"])
    short = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--save_strategy",
             "no", "--total_episodes", str(source.config.batch)]  # fmt: skip
    before, sys.argv = sys.argv, [words[1], *words[2:], *short]
    try:
        space = runpy.run_path(words[1])
    finally:
        sys.argv = before
    found = space["rows"]["train"]["input_ids"][:LIMIT]
    mine = [encode_prompt(source.tokenizer, row.prompt) for row in source.train[:LIMIT]]
    kl = [
        row["objective/kl"] for row in space["trainer"].state.log_history if "objective/kl" in row
    ]
    return {"arguments": f"{len(words) - 2} words parsed",
            "one step": f"KL of the first rollout {kl[0]:.4f}",
            "tokens": same(zip(found, mine, strict=True))}  # fmt: skip


def check_trl(stage: str, source: Source, words: list[str]) -> dict[str, str]:
    """One stage in TRL."""
    return trl_ppo(source, words) if stage == "ppo" else trl_supervised(source, words)


# --- OpenRLHF -----------------------------------------------------------------------------------


def without_flash_attention() -> None:
    """An empty module of its name, where it is not installed."""
    if importlib.util.find_spec("flash_attn"):
        return
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils",
                 "flash_attn.utils.distributed", "flash_attn.flash_attn_interface",
                 "flash_attn.ops", "flash_attn.ops.triton",
                 "flash_attn.ops.triton.cross_entropy"):  # fmt: skip
        stub = types.ModuleType(name)
        stub.__path__ = []
        stub.__getattr__ = lambda attribute: MagicMock()
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = stub


def parsed_by(module: str, words: list[str]) -> SimpleNamespace:
    """What the program's own `if __name__ == "__main__"` block hands to `train`."""
    file = importlib.util.find_spec(module).origin
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.If)]
    program = importlib.import_module(module)
    got: list = []
    space = vars(program) | {"train": got.append, "__name__": "__main__"}
    before, sys.argv = sys.argv, [module, *words]
    try:
        exec(compile(ast.Module(main.body, []), file, "exec"), space)
    finally:
        sys.argv = before
    return got[0]


def check_openrlhf(stage: str, source: Source, words: list[str]) -> dict[str, str]:
    """Parse with the program's own code, load with its own data set classes."""
    without_flash_attention()
    module = next(word for word in words if word.startswith("openrlhf.cli."))
    flags = words[words.index(module) + 1 :]
    args = parsed_by(module, flags)
    from openrlhf.datasets import PromptDataset, RewardDataset, SFTDataset
    from openrlhf.datasets.utils import blending_datasets

    strategy = SimpleNamespace(args=args, print=lambda *rest: None, is_rank_0=lambda: False)
    name = args.data.prompt_dataset if stage == "ppo" else args.data.dataset
    rows = blending_datasets(name, None, strategy, dataset_split="train")
    rows = rows.select(range(min(LIMIT, len(rows))))
    kept, tokenizer = source.train[: len(rows)], source.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if stage == "sft":
        data = SFTDataset(rows, tokenizer, args.data.max_len, strategy, num_processors=1)
        pairs = []
        for i, row in enumerate(kept):
            ids, _, mask = data[i]
            tokens, mine = ours(source, row)
            # Their mask stands at the position that predicts, ours at the token.
            pairs.append(((ids[0].tolist(), [0, *mask[0].int().tolist()[:-1]]), (tokens, mine)))
    elif stage == "ppo":
        data = PromptDataset(rows, tokenizer, strategy)
        pairs = [(tokenizer(data[i][1], add_special_tokens=False)["input_ids"],
                  encode_prompt(tokenizer, row.prompt)) for i, row in enumerate(kept)]  # fmt: skip
    else:
        data = RewardDataset(rows, tokenizer, args.data.max_len, strategy,
                             is_dpo=stage == "dpo", num_processors=1)  # fmt: skip
        pairs = [
            (data[i][place][0].tolist(), ours(source, row, text)[0])
            for i, row in enumerate(kept)
            for place, text in ((0, row.chosen), (2, row.rejected))
        ]
    return {"arguments": f"{len(flags)} words parsed", "tokens": same(pairs)}


# --- verl ---------------------------------------------------------------------------------------


def check_verl(stage: str, source: Source, words: list[str]) -> dict[str, str]:
    """Compose the configuration with Hydra, validate it, load with verl's own data set classes."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    place = Path(verl.__file__).parent / "trainer" / "config"
    name = "sft_trainer_engine" if stage == "sft" else "ppo_trainer"
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    with initialize_config_dir(str(place), version_base=None):
        config = compose(name, overrides)
    out = {"arguments": f"{len(overrides)} overrides composed"}
    tokenizer, kept = source.tokenizer, source.train[:LIMIT]
    if stage == "sft":
        for part in (config.optim, config.model, config.engine, config.checkpoint):
            omega_conf_to_dataclass(part)
        from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

        data = MultiTurnSFTDataset(config.data.train_files, tokenizer, config.data)
        found = [data[i] for i in range(len(kept))]
        pairs = [((r["input_ids"].tolist(), r["loss_mask"].tolist()), ours(source, row))
                 for r, row in zip(found, kept, strict=True)]  # fmt: skip
    else:
        from verl.utils.config import validate_config
        from verl.utils.dataset.rl_dataset import RLHFDataset

        validate_config(config, use_reference_policy=True, use_critic=True)
        for part in (config.actor_rollout_ref.actor, config.critic, config.algorithm,
                     config.actor_rollout_ref.rollout):  # fmt: skip
            omega_conf_to_dataclass(part)
        data = RLHFDataset(config.data.train_files, tokenizer, config.data)
        pairs = [
            (tokenizer.apply_chat_template(list(data[i]["raw_prompt"]), tokenize=True,
                                           add_generation_prompt=True, return_dict=False),
             encode_prompt(tokenizer, row.prompt)) for i, row in enumerate(kept)
        ]  # fmt: skip
        assert {"data_source", "reward_model", "extra_info"} <= set(data[0])
        out["validated"] = "by validate_config and the dataclasses"
    return out | {"tokens": same(pairs)}


CHECKS = {"trl": check_trl, "openrlhf": check_openrlhf, "verl": check_verl}


def main() -> None:
    """Train the tiny runs where they are missing, export each, check, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=sorted(CHECKS))
    parser.add_argument("--folder", type=Path, default=Path("exports-check"))
    asked = parser.parse_args()
    runs = asked.folder.absolute() / "runs"
    for name, command in RUNS.items():
        if cli.main([*command, *TINY, "--out", str(runs / name)]):
            sys.exit(1)
    lines, here = [], Path.cwd()
    for stage in STAGES[asked.library]:
        out = asked.folder.absolute() / f"{asked.library}-{stage}"
        settings = ExportConfig(to=asked.library, run=runs / stage, out=out)
        if not out.exists():
            export(settings)
        os.chdir(out)
        try:
            found = CHECKS[asked.library](stage, read_source(settings), words_of(out))
        finally:
            os.chdir(here)
        lines += [f"| {stage} | {what} | {result} |" for what, result in found.items()]
    console.print(f"\n{asked.library} {version(asked.library)}, torch {torch.__version__}\n")
    console.print("\n".join(["| stage | what | result |", "|---|---|---|", *lines]), markup=False)


if __name__ == "__main__":
    main()
