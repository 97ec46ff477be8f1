"""What is exported: a stage's settings, the model it starts from, and its data as texts."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from rlhf_course import adapters, checkpoints
from rlhf_course.data import split_rows
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.export.settings import ExportConfig
from rlhf_course.files import read_json
from rlhf_course.huggingface import load_tokenizer
from rlhf_course.runs import read_metrics
from rlhf_course.schemas import Dialogue, Preference, Prompt, PromptRow
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.cards import start_of
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.comparisons import read_comparisons_run
from rlhf_course.stages.loading import read_data, too_long
from rlhf_course.stages.presets import resolve, workspace
from rlhf_course.stages.settings import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf_course.stages.setup import before, plain_template, world_for
from rlhf_course.training import derive_seed

KINDS = {"sft": SFTConfig, "reward_model": RewardModelConfig, "dpo": DPOConfig, "ppo": PPOConfig}
END = 4  # the most tokens that a template writes behind an answer
# A setting that only this stage has.
MARKS = {"packing": "sft", "pooling": "reward_model", "beta": "dpo", "kl_coef": "ppo"}


class Pair(NamedTuple):
    """Two answers to a prompt."""

    prompt: Prompt
    chosen: str
    rejected: str


Row = Dialogue | Pair | PromptRow


@dataclass
class Source:
    """A stage to export. `start` and `reward_model` are directories or hub names; `template` is
    set where the tokenizer has no chat template of its own; lengths are counted in tokens."""

    stage: str
    config: Any
    start: str
    reward_model: str | None
    train: list[Row]
    held: list[Row]
    tokenizer: Any
    template: str | None = None
    answer_length: float | None = None
    notes: list[str] = field(default_factory=list)
    per_prompt: float = 1.0
    """Pairs that one prompt gave."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, in the chat template."""
        return max(len(encode_prompt(self.tokenizer, row.prompt)) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and answer."""
        return min(max(self.tokens_of(row) for row in self.rows), self.context)

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.train, *self.held]

    @property
    def context(self) -> int:
        """The most tokens that the model takes."""
        return checkpoints.context_of(checkpoints.resolve(self.start))

    def tokens_of(self, row: Row | Preference) -> int:
        """Tokens of a row's prompt with its longest answer, in the chat template."""
        answers = {Dialogue: lambda: [row.response], Pair: lambda: [row.chosen, row.rejected],
                   Preference: lambda: row.responses, PromptRow: list}[type(row)]()  # fmt: skip
        start = len(encode_prompt(self.tokenizer, row.prompt))
        if not answers:
            return start
        written = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        return start + max(map(len, written)) + END


def settings_of_run(run: Path) -> tuple[str, Any]:
    """(stage, configuration) of a run folder. Raises ConfigError, CheckpointError."""
    if not (run / "config.json").exists():
        raise ConfigError(f"--run {run}: no config.json in it, so it is no run folder.")
    values = read_json(run / "config.json")
    stage = next((stage for mark, stage in MARKS.items() if mark in values), None)
    if stage is None:
        raise ConfigError(
            f"--run {run}: a run of a stage that has no equivalent. Give the folder of an sft, "
            "reward_model, dpo or ppo run."
        )
    known = {f.name for f in fields(KINDS[stage])}  # a run of ppo-ray has some more
    config = KINDS[stage](**{k: v for k, v in values.items() if k in known}, out=run)
    return stage, resolve(config, stage)


def settings_of_flags(asked: ExportConfig) -> tuple[str, Any]:
    """(stage, configuration) of flags, checked as the stage itself would check them."""
    stage = asked.stage.replace("-", "_")
    given = ["--data", asked.data] if asked.data else []
    given += ["--model", asked.model] if asked.model else []
    command = f"rlhf-course {asked.stage}"
    config = tyro.cli(KINDS[stage], prog=command, args=[*given, *shlex.split(asked.settings)])
    check_settings(resolve(config, stage))
    return stage, config


def _start(stage: str, config) -> tuple[str | Path, Path]:
    """(the model that the stage starts from, its directory)."""
    start = start_of(config, stage)
    if start is None:
        raise ConfigError(
            "this run begins with new weights, and the other libraries begin with a checkpoint. "
            "Name one with --model; that of this run goes on from where it ended."
        )
    if config.model is None:
        start = before(config, Path(start).parts[-2])  # says how to make it
    directory = checkpoints.resolve(start)
    if adapters.is_adapter(directory):
        raise ConfigError(
            f"{start}: a LoRA adapter, and the other libraries start from whole weights. Merge it "
            "into its base (peft's merge_and_unload), save that with its tokenizer, and name it "
            "with --model."
        )
    return start, directory


def _eos_note(directory: Path, tokenizer) -> list[str]:
    """Where the tokenizer's files name another EOS than the one that ends an answer."""
    from transformers import AutoTokenizer

    named = AutoTokenizer.from_pretrained(directory).eos_token
    if named == tokenizer.eos_token:
        return []
    return [
        f"The tokenizer's EOS is {named}, its chat template ends an answer with "
        f"{tokenizer.eos_token}: we stop at the second, the other library may need to be told."
    ]


# In how many bits a library holds the frozen weights under an adapter.
BITS = {"trl": ("4bit", "8bit"), "openrlhf": ("4bit",), "verl": ()}


def _bits_note(asked: ExportConfig, config) -> list[str]:
    """Where the other library does not round them as --quantize does."""
    bits = getattr(config, "quantize", None)
    if bits is None or bits in BITS[asked.to]:
        return []
    return [f"--quantize {bits} has no counterpart: the frozen weights take their whole memory."]


def read_source(asked: ExportConfig) -> Source:
    """Everything that is exported. Raises ConfigError, DataError or ModelError like the stage."""
    if (asked.run is None) == (asked.stage is None):
        raise ConfigError("give either --run (a run folder) or --stage (with --data and --model).")
    if asked.run is not None and (asked.data or asked.settings):
        raise ConfigError(
            "--data and --settings do not go with --run, whose own they are. Leave them out, or "
            "give --stage instead of --run."
        )
    stage, config = settings_of_run(asked.run) if asked.run else settings_of_flags(asked)
    if asked.model:
        config.model = asked.model
    start, directory = _start(stage, config)
    tokenizer = load_tokenizer(directory, str(start))
    source = Source(stage, config, place(start), None, [], [], tokenizer)
    source.notes = [*_eos_note(directory, tokenizer), *_bits_note(asked, config)]
    if tokenizer.chat_template is None:
        source.template = tokenizer.chat_template = plain_template(tokenizer)
    READERS[stage](source)
    if stage == "ppo":
        if not config.reward:
            source.reward_model = place(config.reward_model or before(config, "reward_model"))
        if asked.run:
            lengths = [row["length"] for row in read_metrics(asked.run) if "length" in row]
            source.answer_length = statistics.mean(lengths) if lengths else None
    return source


def place(name: str | Path) -> str:
    """A directory as a path that holds from anywhere; a hub name as it is."""
    return Path(name).absolute().as_posix() if Path(name).is_dir() else str(name)


def _fitting(source: Source, kind: str) -> tuple[list, list]:
    """(training rows, held-out rows) of --data, read by its flags; without those that exceed the
    model's context, unless such rows are an error (`--too-long stop`): then DataError."""
    config, data = source.config, read_data(source.config, kind)
    room = source.context - (config.max_new_tokens if kind == "prompts" else 0)
    long = {i for i, item in enumerate(data.items) if source.tokens_of(item) > room}
    policy = too_long(config, data)
    if long and policy == "stop":
        raise DataError(
            f"{data.places[min(long)]}: {source.tokens_of(data.items[min(long)])} tokens exceed "
            f"{room}; {len(long)} of {len(data.items)} rows are too long. Give --too-long drop."
        )
    if long:
        source.notes.append(
            f"{len(long)} of {len(data.items)} rows exceed {room} tokens and are left out"
            + (", where our own stage cuts them." if policy == "cut" else ", as in our own stage.")
        )
    parts = split_rows(range(len(data.items)), config.validation, config.seed)
    held, train = ([data.items[i] for i in part if i not in long] for part in parts)
    if not train:
        raise DataError(f"{config.data}: no row is left that fits the model's context.")
    return train, held


def _read_dialogues(source: Source) -> None:
    config = source.config
    if config.data:
        source.train, source.held = _fitting(source, "dialogues")
    else:
        rows = [Dialogue(d.prompt.text, d.response) for d in world_for(config).demonstrations()]
        source.held, source.train = split_rows(rows, 0.05, config.seed)
    if config.corpus_rows:
        source.notes.append(
            f"--corpus-rows {config.corpus_rows}: pretraining text in each batch, against "
            "forgetting, has no counterpart and is left out."
        )


def _pairs(source: Source, ranked: list[tuple[Prompt, tuple[str, ...]]]) -> list[Pair]:
    """Pairs of ranked answers: all of them, or with DPO's `best_worst` one a prompt."""
    all_of_them = getattr(source.config, "pairs", "all") == "all"
    found = []
    for prompt, answers in ranked:
        last = len(answers) - 1
        chosen = combinations(range(last + 1), 2) if all_of_them else [(0, last)]
        found += [Pair(prompt, answers[i], answers[j]) for i, j in chosen]
    return found


def _read_pairs(source: Source) -> None:
    config = source.config
    if config.data:
        train, held = _fitting(source, "comparisons")
    else:
        train, held = _world_comparisons(source)
    source.train, source.held = _pairs(source, train), _pairs(source, held)
    good = [p for p in source.train if p.chosen.strip() and p.rejected.strip()]
    good = [p for p in good if p.chosen != p.rejected]
    if left := len(source.train) - len(good):
        source.notes.append(
            f"{left} of {len(source.train)} pairs are left out: an answer is empty, or both are "
            "the same text and differ only in whether they ended."
        )
    if not good:
        raise DataError("no pair of different answers is left to export.")
    source.per_prompt = len(source.train) / len(train)
    source.train = good
    source.held = [p for p in source.held if p.chosen.strip() and p.rejected.strip()]


def _world_comparisons(source: Source) -> tuple[list, list]:
    folder = workspace(source.config) / "comparisons"
    if not (folder / "done.json").exists():
        raise DataError(
            f"{folder}: no finished run of `rlhf-course comparisons`, which this stage learns "
            "from. Run it first, or give comparisons with --data."
        )
    train, held = (read_comparisons_run(folder / f"{name}.jsonl")
                   for name in ("comparisons", "heldout"))  # fmt: skip
    cut = sum(not end for c in train for end in c.finished)
    if cut:
        source.notes.append(
            f"{cut} of {sum(len(c.finished) for c in train)} answers never ended; as texts they "
            "get an EOS like the others, which our own stage would not give them."
        )
    return tuple([(c.prompt.text, c.responses) for c in part] for part in (train, held))


def _read_prompts(source: Source) -> None:
    config = source.config
    if config.data:
        source.train, source.held = _fitting(source, "prompts")
        return
    count = config.batch // config.answers_per_prompt
    extra = {} if config.known_share is None else {"known_share": config.known_share}
    world = world_for(config)
    for step in range(config.critic_warmup + config.iterations):  # those that our run would ask
        seed = derive_seed(config.seed, "ppo prompts", step)
        source.train += [PromptRow(p.text, {}) for p in world.prompts("ppo", count, seed, **extra)]


READERS = {"sft": _read_dialogues, "reward_model": _read_pairs, "dpo": _read_pairs,
           "ppo": _read_prompts}  # fmt: skip
