"""Texts as tokens, within a model's context: what becomes of those that do not fit (`--too-long`).

    stop   an error that counts them and names the longest
    drop   left out, counted
    cut    of a dialogue of many turns the oldest are left out first, whole turns, until what is
           left begins with the user and fits; only then is the answer's end cut off (it has no EOS
           then, so nobody learns to stop there). A prompt that leaves no room at all is dropped.

The same for every stage. An answer to be sampled (PPO) needs room: that is `reserve`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf_course.data_report import DataReport, quantile
from rlhf_course.errors import DataError
from rlhf_course.schemas import Prompt
from rlhf_course.sft import encode_dialogue, encode_prompt
from rlhf_course.sources import Place

SMALLEST, LARGEST = 64, 1024
"""Contexts that are chosen from the data lie between these."""
SHARE = 0.95
"""Of the rows that a context chosen from the data has to hold."""
SAMPLE = 20_000  # characters of a text whose length is estimated


class TokenTable(Sequence):
    """Rows of token lists in one int32 array: 4 bytes a token, where a list of Python takes 36.

    make: what becomes of a row's lists when it is asked for. Rows may be picked (`take`) without
    copying any token.
    """

    def __init__(self, make: Callable[..., Any]):
        self.make = make
        self._tokens, self._ends, self._rows = array("i"), array("q", [0]), array("q", [0])
        self._picked: array | None = None

    def append(self, *lists: Sequence[int]) -> None:
        """One more row."""
        for tokens in lists:
            self._tokens.extend(tokens)
            self._ends.append(len(self._tokens))
        self._rows.append(len(self._ends) - 1)

    def take(self, numbers: Sequence[int]) -> TokenTable:
        """The table of these rows only; the tokens are shared."""
        out = TokenTable(self.make)
        out._tokens, out._ends, out._rows = self._tokens, self._ends, self._rows
        out._picked = array("q", (self._row(i) for i in numbers))
        return out

    def __len__(self) -> int:
        return len(self._rows) - 1 if self._picked is None else len(self._picked)

    def _row(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return i if self._picked is None else self._picked[i]

    def lists(self, i: int) -> list[list[int]]:
        """The token lists of row i."""
        row = self._row(i)
        cuts = self._ends[self._rows[row] : self._rows[row + 1] + 1]
        return [self._tokens[a:b].tolist() for a, b in pairwise(cuts)]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.make(*self.lists(i))


@dataclass
class Encoder:
    """Prompts and answers through the chat template, each with its place for messages."""

    tokenizer: Any
    report: DataReport
    bad_rows: str = "stop"

    def __post_init__(self) -> None:
        self._widest = max(len(token.encode()) for token in self.tokenizer.get_vocab())

    def reach(self, tokens: int) -> int:
        """The most characters that so many tokens can write."""
        return tokens * self._widest

    def beyond(self, texts: Sequence[str], limit: int) -> int | None:
        """About how many tokens the texts take, if they are certain to take more than `limit`: no
        token is wider than the widest of the vocabulary. Else None.

        A row of a megabyte is not worth the second that its tokens take.
        """
        characters = sum(map(len, texts))
        if characters <= self.reach(limit):
            return None
        longest = max(texts, key=len)[:SAMPLE]
        share = len(self.tokenizer(longest, add_special_tokens=False)["input_ids"]) / len(longest)
        return max(round(characters * share), limit + 1)

    def encode(self, place, prompt: Prompt, answers: Sequence[str]) -> list[list[int]] | None:
        """[prompt, answer, answer, …] as tokens; None for a row that is dropped as a bad one.

        Raises DataError naming the place where the row cannot be encoded.
        """
        try:
            if not answers:
                return [encode_prompt(self.tokenizer, prompt)]
            pairs = [encode_dialogue(self.tokenizer, prompt, answer) for answer in answers]
        except DataError as error:
            if self.bad_rows == "stop":
                raise DataError(f"{place}: {error}") from None
            self.report.dropped.add("not to be written by the chat template", place, str(error))
            return None
        start = pairs[0][1]
        return [pairs[0][0][:start], *(tokens[start:] for tokens, _ in pairs)]


def texts_of(prompt: Prompt) -> list[str]:
    """The texts of a prompt's turns."""
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def shorter(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt without its oldest turns, ever fewer; each begins with the user, behind the
    system's message where there is one."""
    if isinstance(prompt, str):
        return
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(head) :]
    for i in range(1, len(turns)):
        if turns[i]["role"] == "user":
            rest = [*head, *turns[i:]]
            yield rest[0]["content"] if len(rest) == 1 else rest


class Fitter:
    """Rows into a table of tokens: first all of them as they are, then those that fit.

    fitter = Fitter(table, encoder, limit)
    fitter.add(place, prompt, answers)                 for every row
    kept = fitter.fit(context, "drop", text)           row -> its number in the table
    """

    def __init__(self, table: TokenTable, encoder: Encoder, limit: int, reserve: int = 0):
        """limit: the largest context that can be asked for; reserve: room for an answer."""
        self.table, self.encoder, self.limit, self.reserve = table, encoder, limit, reserve
        self.report = encoder.report
        self.places: list[Place | str] = []
        self.prompts: dict[int, Prompt] = {}
        """What became of prompts that were cut."""
        self._needs, self._starts = array("q"), array("q")  # tokens; 0: dropped already

    def add(self, place: Place | str, prompt: Prompt, answers: Sequence[str] = ()) -> None:
        """Encode one row, or estimate it where it is beyond every context.

        Raises DataError as `Encoder.encode`.
        """
        self.places.append(place)
        texts, longest = texts_of(prompt), max(answers, key=len, default="")
        about = self.encoder.beyond([*texts, longest], self.limit)
        if about is not None:
            self._measured(about + self.reserve, 0, [])
            mostly_answer = len(longest) > sum(map(len, texts))
            side = self.report.answer_tokens if mostly_answer else self.report.prompt_tokens
            side.append(about)
        elif (lists := self.encoder.encode(place, prompt, answers)) is None:
            self._measured(0, 0, [])
        else:
            start, *ends = map(len, lists)
            self._measured(start + max(ends, default=0) + self.reserve, start, lists)
            self.report.prompt_tokens.append(start)
            self.report.answer_tokens.extend(ends)

    def _measured(self, need: int, start: int, lists: list[list[int]]) -> None:
        self._needs.append(need)
        self._starts.append(start)
        self.table.append(*lists)

    def choose_context(self, policy: str, room: int) -> int:
        """A context for a new model: what 95 % of the rows need, or with "stop" all of them, but
        for each prompt at least `room` tokens for an answer (that is what PPO will sample);
        rounded up to a multiple of 64, from 64 to 1024."""
        both = zip(self._needs, self._starts, strict=True)
        needs = [max(need, start + room) for need, start in both if need] or [SMALLEST]
        need = quantile(needs, 1.0 if policy == "stop" else SHARE)
        return min(max(-(-need // 64) * 64, SMALLEST), LARGEST)

    def fit(self, context: int, policy: str, text: Callable[[int], tuple]) -> dict[int, int]:
        """Row -> its number in the table, of the rows that are to be used. One that is cut gets a
        new number; `text(row)` gives its prompt and answers once more.

        Raises DataError by the policy, and when nothing is left.
        """
        self.report.context = context
        long = [i for i, need in enumerate(self._needs) if need > context]
        if long and policy == "stop":
            self._stop(long, context)
        kept = {i: i for i, need in enumerate(self._needs) if 0 < need <= context}
        for i in long:
            if policy == "drop":
                reason = f"longer than the context of {context} tokens"
                self.report.dropped.add(reason, self.places[i])
            elif lists := self._cut(i, context, *text(i)):
                kept[i] = len(self.table)
                self.table.append(*lists)
        if not kept:
            reasons = "; ".join(f"{c.count} {name}" for name, c in self.report.dropped.items())
            raise DataError(
                f"{self.report.source}: no row is left to learn from: {reasons}. Take a model with "
                "a longer context (--context for a new one), or shorten the data."
            )
        self.report.used = len(kept)
        return kept

    def _stop(self, long: list[int], context: int) -> None:
        worst = max(long, key=self._needs.__getitem__)
        tokens = self._needs[worst] - self.reserve
        room = f", and with {self.reserve} for the answer they" if self.reserve else ","
        lower = "lower --max-new-tokens, " if self.reserve else ""
        raise DataError(
            f"{self.places[worst]}: {tokens} tokens{room} exceed the context of {context}; "
            f"{len(long)} of {len(self._needs)} rows are too long, this one the most. Leave them "
            f"out with --too-long drop, shorten them with --too-long cut, {lower}or take a model "
            "with a longer context (--context for a new one)."
        )

    def _cut(self, i: int, context: int, prompt: Prompt, answers: Sequence[str]):
        """Row i within the context, or None where no token of an answer would have room."""
        place, room = self.places[i], context - self.reserve
        answers = [answer[: self.encoder.reach(room)] for answer in answers]
        best = None
        for candidate in (prompt, *shorter(prompt)):
            if self.encoder.beyond(texts_of(candidate), room) is not None:
                continue
            lists = self.encoder.encode(place, candidate, answers)
            if lists is None:
                return None
            if len(lists[0]) + bool(answers) <= room:
                best = candidate, lists
            if len(lists[0]) + max(map(len, lists[1:]), default=0) <= room:
                break
        if best is None:
            self.report.dropped.add(f"prompt fills the context of {context} tokens", place)
            return None
        self.prompts[i], (start, *whole) = best
        shortened = [tokens[: room - len(start)] for tokens in whole]
        if len(set(map(tuple, shortened))) < len(shortened):
            self.report.dropped.add("answers the same once they are cut", place)
            return None
        if self.prompts[i] is not prompt:
            self.report.changed.add("oldest turns of the prompt left out", place)
        if shortened != whole:
            self.report.changed.add("end of an answer cut off", place)
        return [start, *shortened]
