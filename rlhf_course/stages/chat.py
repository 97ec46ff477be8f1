"""Talk to two checkpoints side by side: the same question to both, before and after PPO.

    rlhf-course chat                                        PPO-ptx against SFT, town, small, seed 0
    rlhf-course chat --model runs/…/ppo/model --against runs/…/pretrain/model
    echo "Where does Ann Lee Cole live?" | rlhf-course chat

Every question stands alone, as in training: the models remember nothing. In an embedded world the
labeler's verdict and the gold utility stand beside an answer to one of the world's questions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from rlhf_course.errors import ConfigError, CourseError, ModelError
from rlhf_course.progress import console
from rlhf_course.sampling import generate
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.presets import PRESETS
from rlhf_course.stages.setup import before, device_of, frozen, load_policy, world_of
from rlhf_course.stages.viewing_settings import ChatConfig
from rlhf_course.training import torch_generator
from rlhf_course.world import Prompt, World

HELP = """\
Type a question; both models answer it. They were trained on single questions and remember nothing.
/again           the same question, sampled anew
/temperature X   0: the likeliest answer; 1: as trained; more: wilder
/help  /quit     this text; the end (Ctrl-D and Ctrl-C too)"""


@dataclass
class Answer:
    """What one model said, and what the labeler makes of it (None: no question of the world)."""

    speaker: str
    text: str
    finished: bool
    verdict: str | None = None
    gold: float | None = None

    @property
    def judgement(self) -> str:
        """ "true, gold +1.00", and whether the answer was cut off."""
        parts = [] if self.verdict is None else [self.verdict, f"gold {self.gold:+.2f}"]
        return ", ".join(parts + ["never ended"] * (not self.finished))


class Chat:
    """Two models, the questions that a labeler can judge, and the last question."""

    def __init__(self, config: ChatConfig):
        if config.temperature < 0:
            raise ConfigError(f"--temperature {config.temperature}: give 0 or more.")
        if config.max_new_tokens is not None and config.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {config.max_new_tokens}: give at least 1.")
        self.config, self.temperature = config, config.temperature
        own = PRESETS[config.world, config.size]["ppo"]["max_new_tokens"]
        elsewhere = config.model is not None and config.against is not None
        self.longest = config.max_new_tokens or (64 if elsewhere else own)
        self.device = device_of(config)
        first = config.model or before(config, "ppo")
        second = config.against or before(config, "sft")
        names = names_of(str(first), str(second))
        self.models = {
            name: load_policy(source, self.device)
            for name, source in zip(names, (first, second), strict=True)
        }
        for model, _ in self.models.values():
            frozen(model)
        self.world = world_of(config.world, config.size, config.seed)
        self.questions = questions_of(self.world)
        self.turn, self.last = 0, ""

    def ask(self, prompt: str) -> list[Answer]:
        """Both models' answers to a question.

        Raises ModelError when it does not fit a model's context or there is no chat template.
        """
        self.turn, self.last = self.turn + 1, prompt
        return [self._answer(name, prompt) for name in self.models]

    def _answer(self, name: str, prompt: str) -> Answer:
        model, tokenizer = self.models[name]
        tokens = encode_prompt(tokenizer, prompt)
        room = min(self.longest, model.context - len(tokens))
        if room < 1:
            raise ModelError(
                f"the question has {len(tokens)} tokens, and {name} reads {model.context} with its "
                "answer. Ask a shorter one."
            )
        generator = torch_generator(
            self.config.seed, "chat", self.turn, device=self.device.device
        )  # the same draws for both models
        out = generate(
            model, [tokens], room, tokenizer.eos_token_id, self.temperature, generator=generator
        )
        text = tokenizer.decode(out.responses[0], skip_special_tokens=True).strip()
        answer = Answer(name, text, out.finished[0])
        question = self.questions.get(prompt)
        if question is not None:
            answer.verdict = self.world.verdict(question, text, answer.finished)
            answer.gold = self.world.utility(question, text, answer.finished)
        return answer

    def command(self, line: str) -> str:
        """Do what a line with a leading slash says (/quit and /again apart); returns the reply."""
        word, _, rest = line.partition(" ")
        if word == "/help":
            return HELP
        if word == "/temperature":
            try:
                value = float(rest)
            except ValueError:
                value = -1.0
            if not 0 <= value < float("inf"):
                return f"temperature {rest!r}: give a number, 0 or more, as in /temperature 0.7"
            self.temperature = value
            return f"temperature {value:g}"
        return f"{word}: unknown; /help lists the commands"


def names_of(first: str, second: str) -> tuple[str, str]:
    """Short names: the run folder's, else the last part of the path; never twice the same."""

    def short(source: str) -> str:
        path = Path(source)
        return path.parent.name if path.name == "model" and path.parent.name else path.name

    a, b = short(first), short(second)
    return (a, b) if a != b else (f"{a} (1)", f"{b} (2)")


def questions_of(world: World) -> dict[str, Prompt]:
    """Text -> Prompt: all evaluation and validation prompts, and some thousands of PPO's."""
    prompts = list(world.prompts("ppo", 4000))
    for split in ("validation", "evaluation"):
        for group in world.evaluation_prompts(split).values():
            prompts += group
    return {prompt.text: prompt for prompt in prompts}


def examples_of(world: World) -> dict[str, str]:
    """Group -> one of its evaluation prompts."""
    return {group: asked[0].text for group, asked in world.evaluation_prompts().items() if asked}


# ------------------------------------------------------------------------------------ the terminal


def chat(config: ChatConfig) -> None:
    """Talk until /quit, Ctrl-D or Ctrl-C; without a terminal: one question a line on stdin."""
    talk = Chat(config)
    interactive = sys.stdin.isatty()
    if interactive:
        one, other = talk.models
        console.print(f"[bold]chat[/bold]  {talk.device}")
        console.print(Text(f"{one} and {other}. For example:"))
        for group, example in examples_of(talk.world).items():
            console.print(Text(f"  {example}   ({group})"))
        console.print("/help lists the commands.\n")
    try:
        for line in lines(interactive):
            if line == "/quit":
                break
            if line == "/again" and talk.last:
                line = talk.last
            elif line == "/again":
                console.print("nothing was asked yet")
                continue
            elif line.startswith("/"):
                console.print(Text(talk.command(line)), soft_wrap=True)
                continue
            reply(talk, line, interactive)
    except KeyboardInterrupt:
        console.print()
    if interactive:
        console.print("Goodbye.")


def lines(interactive: bool) -> Iterator[str]:
    """What is typed or piped in, a line at a time, without empty ones, up to its end."""
    if interactive:
        import contextlib

        with contextlib.suppress(ImportError):  # arrow keys and history, where there is readline
            import readline  # noqa: F401
    while True:
        try:
            line = input("you > " if interactive else "").strip()
        except EOFError:
            if interactive:
                console.print()
            return
        if line:
            yield line


def reply(talk: Chat, prompt: str, interactive: bool) -> None:
    """Ask both and print: panels side by side in a terminal, plain lines in a pipe."""
    try:
        answers = talk.ask(prompt)
    except CourseError as error:
        console.print(Text(str(error)), soft_wrap=True)
        return
    if not interactive:
        console.print(Text(f"> {prompt}"), soft_wrap=True)
        for answer in answers:
            note = f"  [{answer.judgement}]" if answer.judgement else ""
            console.print(Text(f"{answer.speaker}: {answer.text}{note}"), soft_wrap=True)
        return
    width = max((console.width - 1) // 2, 30)
    panels = [
        Panel(Text(answer.text), title=Text(answer.speaker), title_align="left",
              subtitle=Text(answer.judgement), subtitle_align="left", width=width)
        for answer in answers
    ]  # fmt: skip
    console.print(Columns(panels, padding=(0, 0)))
