"""What PPO asks: an embedded world's prompts, or a data set's; and what a world says of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf_course.data_report import DataReport
from rlhf_course.schemas import Prompt
from rlhf_course.sft import encode_prompt
from rlhf_course.sources import Row
from rlhf_course.stages.fitting import Encoder, Fitter, TokenTable
from rlhf_course.stages.loading import bad_rows, read_data, split_table, tell, too_long
from rlhf_course.stages.rollouts import Answers, Task
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.stages.setup import world_for
from rlhf_course.training import derive_seed, epoch_batch


def world_tasks(tokenizer, prompts) -> list[Task]:
    """A world's prompts as tasks."""
    return [Task(p.text, encode_prompt(tokenizer, p.text), source=p) for p in prompts]


def grouped(tasks: list[Task], size: int) -> list[Task]:
    """Every task `size` times, side by side."""
    return [task for task in tasks for _ in range(size)]


def judged(world, answers: Answers) -> dict[str, float]:
    """The world's own utility of the answers, which no learner sees, and the share of each kind."""
    said = list(zip(answers.tasks, answers.texts, answers.finished.tolist(), strict=True))
    gold = [world.utility(task.source, text, end) for task, text, end in said]
    kinds = Counter(world.verdict(task.source, text, end) for task, text, end in said)
    shares = {f"share_{kind}": kinds[kind] / len(said) for kind in sorted(world.verdicts)}
    return {"gold": sum(gold) / len(gold), **shares}


class Tasks(Sequence):
    """Prompts of a data set as tasks, which are made when they are asked for."""

    def __init__(self, table: TokenTable, texts: list[tuple[Prompt, Row]], numbers: list[int]):
        self._table, self._texts, self._numbers = table, texts, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        text, row = self._texts[self._numbers[i]]
        return Task(text, self._table[i], row)


class Prompts:
    """The tasks of iteration i: from the world, fresh each time, or from a data set, shuffled.

    The answers to one prompt (`answers_per_prompt`) are tasks that stand side by side.
    """

    def __init__(self, config: PPOConfig, tokenizer, context: int):
        self.config, self.tokenizer = config, tokenizer
        self.world = None if config.data else world_for(config)
        self.pool: Sequence[Task] = []
        self.held: Sequence[Task] = []
        self.report: DataReport | None = None
        if config.data:
            self._encode(context)

    def _encode(self, context: int) -> None:
        """Every prompt of the data set into tokens. Raises DataError as --too-long says."""
        config = self.config
        data = read_data(config, "prompts")
        encoder = Encoder(self.tokenizer, data.report, bad_rows(config, data))
        table = TokenTable(lambda prompt: prompt)
        fitter = Fitter(table, encoder, context, config.max_new_tokens)
        for place, item in zip(data.places, data.items, strict=True):
            fitter.add(place, item.prompt)
        kept = fitter.fit(context, too_long(config, data), lambda i: (data.items[i].prompt, ()))
        held, pool, held_rows, pool_rows = split_table(config, data, fitter, kept)
        texts = [(fitter.prompts.get(i, item.prompt), item.row if config.reward else {})
                 for i, item in enumerate(data.items)]  # fmt: skip
        self.held, self.pool = Tasks(held, texts, held_rows), Tasks(pool, texts, pool_rows)
        self.report = data.report
        tell(data.report)

    def provenance(self) -> tuple[dict[str, int], DataReport | None]:
        """(how many prompts the data set gave, its report); a world makes new ones each time."""
        if self.world is not None:
            return {"answers": self.config.iterations * self.config.batch}, None
        return {"prompts": len(self.pool), "held out": len(self.held)}, self.report

    def __call__(self, iteration: int) -> list[Task]:
        config = self.config
        count = config.batch // config.answers_per_prompt
        if self.world is None:
            size = min(count, len(self.pool))
            picked = epoch_batch(len(self.pool), size, iteration, config.seed, "ppo prompts")
            return grouped([self.pool[i] for i in picked], config.answers_per_prompt)
        seed = derive_seed(config.seed, "ppo prompts", iteration)
        extra = {} if config.known_share is None else {"known_share": config.known_share}
        prompts = self.world.prompts("ppo", count, seed, **extra)
        tasks = world_tasks(self.tokenizer, prompts)
        return grouped(tasks, config.answers_per_prompt)
