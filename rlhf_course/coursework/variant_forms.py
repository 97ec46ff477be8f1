"""A variant of an exercise, and what lies between it and the usual form: arguments and results.

An exercise's tests know its usual form alone. A `Form` turns each of their calls into one that a
variant's answer understands, and the answer's result into what the usual form would have given:
right where the answer is right, wrong where it is wrong. So one set of tests serves all variants.

A call is a dictionary of the arguments that were given, in the order of the signature.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_course.coursework.source import Definition, edited

Call = dict[str, Any]
Edits = Sequence[tuple[str, str]]


def _same(call: Call) -> Call:
    return dict(call)


def _as_it_is(result: Any, call: Call) -> Any:
    return result


@dataclass(frozen=True)
class Form:
    """How a variant's calls and results lie beside those of the usual form."""

    ask: Callable[[Call], Call | None] = _same
    """Usual call -> the variant's, or None for a call that the variant cannot answer."""
    usual: Callable[[Call], Call] = _same
    """The variant's call -> a usual one that says as much."""
    back: Callable[[Any, Call], Any] = _as_it_is
    """(the variant's result, usual call) -> the usual result."""
    forth: Callable[[Any, Call], Any] = _as_it_is
    """(usual result, usual call) -> the variant's result."""

    def adapt(self, answer: Callable, reference: Callable) -> Callable:
        """A variant's answer as a function of the usual form; `reference` answers the rest."""
        signature = inspect.signature(reference)

        def usual_form(*args, **kwargs):
            call = signature.bind(*args, **kwargs).arguments
            asked = self.ask(call)
            if asked is None:
                return reference(*args, **kwargs)
            return self.back(answer(*asked.values()), call)

        usual_form.__name__ = usual_form.__qualname__ = reference.__name__
        usual_form.__signature__ = signature
        return usual_form

    def narrow(self, answer: Callable, solution: Callable) -> Callable:
        """An answer of the usual form as one of the variant's, whose signature is `solution`'s."""
        signature = inspect.signature(solution)

        def variant_form(*args, **kwargs):
            call = self.usual(signature.bind(*args, **kwargs).arguments)
            return self.forth(answer(*call.values()), call)

        variant_form.__name__ = variant_form.__qualname__ = solution.__name__
        variant_form.__signature__ = signature
        return variant_form


USUAL = Form()
"""No difference."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to ask for an exercise."""

    exercise: str
    """Its id."""
    name: str
    """What tells it from the exercise's other variants."""
    group: str
    """Variants of one group are chosen together, by their places in it."""
    says: str
    """What is asked for, to a student: it follows "In this version: "."""
    form: Form = USUAL
    """From and to the usual form."""
    head: Edits = ()
    """Changes to signature and docstring."""
    answer: Edits | str = ()
    """Changes to the solution, or a new one, dedented."""
    tail: Edits = ()
    """Changes to what stands behind the solution."""
    hints: tuple[str, ...] = ()
    """In the place of the manuscript's, where those would mislead."""
    after: str = ""
    """What the function that the rest of the chapter calls does more than the student's own."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Test -> what it demands of this variant, where its own words are about the usual form."""
    sentences: Mapping[str, str] = field(default_factory=dict)
    """Mutant -> what names the mistake here."""
    mistakes: Sequence[tuple[str, str, Edits | str]] = ()
    """Mutants of its own: (name, sentence, changes to the solution or a text in its place)."""

    @property
    def usual(self) -> bool:
        """True where signature and results are those of the exercise as it is."""
        return self.form is USUAL

    def asked(self, found: Definition) -> Definition:
        """The exercise's definition, changed. ValueError where an edit fits no more."""
        whose = f"{self.exercise}, variant {self.name!r}"
        if isinstance(self.answer, str):
            answer = textwrap.indent(textwrap.dedent(self.answer).strip("\n"), found.indent)
        else:
            answer = edited(found.answer, self.answer, whose)
        head, tail = edited(found.head, self.head, whose), edited(found.tail, self.tail, whose)
        return replace(found, head=head, answer=answer, tail=tail)


# ------------------------------------------------------------------------------ mdp.kl_estimate


def one_kind(kind: str) -> Form:
    """`kl_estimate` without `kind`: calls of other kinds are none of the answer's."""

    def ask(call: Call) -> Call | None:
        pair = {name: call[name] for name in ("logprobs", "ref_logprobs")}
        return pair if call.get("kind", "k1") == kind else None

    return Form(ask, usual=lambda call: {**call, "kind": kind})


# ----------------------------------------------------------------------------------- ppo.whiten


def one_mean(shift_mean: bool) -> Form:
    """`whiten` without `shift_mean`. Calls for the other one differ by the mean of x, no more."""

    def ask(call: Call) -> Call:
        asked = {"x": call["x"], "mask": call["mask"]}
        if "eps" in call or "group" in call:  # arguments are handed over by their places
            asked["eps"] = call.get("eps", 1e-8)
        return asked | ({"group": call["group"]} if "group" in call else {})

    def usual(call: Call) -> Call:
        more = {name: call[name] for name in ("eps", "group") if name in call}
        return {"x": call["x"], "mask": call["mask"], "shift_mean": shift_mean, **more}

    def moved(result: Any, call: Call, towards: bool) -> Any:
        x, mask = call["x"], call["mask"]
        wanted = call.get("shift_mean", True)
        if wanted == shift_mean or not isinstance(result, Tensor) or result.shape != x.shape:
            return result
        mean = _mean(x, mask, call.get("group"))
        return torch.where(mask, result - mean if wanted == towards else result + mean, result)

    return Form(
        ask,
        usual,
        back=lambda result, call: moved(result, call, towards=True),
        forth=lambda result, call: moved(result, call, towards=False),
    )


def _mean(x: Tensor, mask: Tensor, group: Any) -> float:
    from rlhf_course.ppo import masked_moments

    return float(masked_moments(x, mask, group)[0])


# -------------------------------------------------------------------------------------- mdp.gae

BEYOND = (0.75, -0.5, 0.0)
"""Values behind the last action, row after row: what an answer that ignores them cannot guess."""


def _bootstrap() -> Form:
    """`gae` with `last_values`. What they add is taken out of the last action's reward before, so
    that the results are those of the usual call."""

    def ask(call: Call) -> Call:
        values, mask = call["values"], call["mask"]
        cycle = [BEYOND[row % len(BEYOND)] for row in range(len(values))]
        beyond = torch.tensor(cycle, dtype=values.dtype, device=values.device)
        less = _paid_last(call["rewards"], -beyond * call.get("gamma", 1.0), mask)
        asked = {"rewards": less, "values": values, "mask": mask, "last_values": beyond}
        return asked | {name: call[name] for name in ("gamma", "lam") if name in call}

    def usual(call: Call) -> Call:
        call = dict(call)
        beyond = call.pop("last_values") * call.get("gamma", 1.0)
        return {**call, "rewards": _paid_last(call["rewards"], beyond, call["mask"])}

    return Form(ask, usual)


def _paid_last(rewards: Tensor, more: Tensor, mask: Tensor) -> Tensor:
    """The rewards with `more` (B,) added at each row's last action."""
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, more[:, None].to(rewards.dtype))


BOOTSTRAP = _bootstrap()

# -------------------------------------------------------------------------------------- padding


def rolled(x: Any, shift: Tensor) -> Any:
    """Row b of x (B, N) moved to the right by shift[b]; what falls out comes in on the left.

    Nothing is lost, so that what stands on a pad is still seen. What is no such table stays.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(shift) or not x.shape[1]:
        return x
    columns = torch.arange(x.shape[1], device=x.device)
    return x.gather(1, (columns - shift[:, None]) % x.shape[1])


def _pads(call: Call, length: int) -> Tensor:
    """How many pads a row has, (B,)."""
    return length - call["prompt_lengths"] - call["response_lengths"]


LEFT_MASK = Form(
    back=lambda result, call: rolled(result, -_pads(call, call["length"])),
    forth=lambda result, call: rolled(result, _pads(call, call["length"])),
)
"""`action_mask` of rows padded on the left: the result has to be moved."""


def _moved_scores(call: Call, sign: int) -> Call:
    scores = call["token_scores"]
    return {**call, "token_scores": rolled(scores, sign * _pads(call, scores.shape[1]))}


LEFT_SCORES = Form(
    ask=lambda call: _moved_scores(call, 1), usual=lambda call: _moved_scores(call, -1)
)
"""`mean_reward` of rows padded on the left: the scores have to be moved."""
