"""What an exercise's tests say: expectations that show a student the input, the wanted and the got.

    @exercise("reward_model.pairwise_loss", core=True)
    def test_equal_rewards(subject, rng):
        "two equal rewards cost log 2"
        same(subject.pairwise_loss, (tensor([1.0]), tensor([1.0])), math.log(2))

A failed expectation raises `Mismatch`, an AssertionError that carries the values. Try small inputs
first: the first mismatch is what the student gets to see.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RTOL, ATOL = 1e-4, 1e-6  # room for another order of float32 operations, far below any mistake


class Mismatch(AssertionError):
    """The answer did something else than was expected.

    what: one sentence; inputs: {name: value} of the call; expected and got: values or words.
    """

    def __init__(self, what: str, inputs: dict | None = None, expected=None, got=None):
        super().__init__(what)
        self.what, self.inputs, self.expected, self.got = what, inputs or {}, expected, got

    def __str__(self) -> str:
        shown = "".join(f"\n  {name} = {value}" for name, value in self.inputs.items())
        return f"{self.what}{shown}\n  expected {self.expected}\n  got      {self.got}"


@dataclass(frozen=True)
class Property:
    """What one test of an exercise stands for; `exercise` hangs it on the test function."""

    exercise: str
    core: bool
    weight: float


def exercise(id: str, core: bool = False, weight: float = 1.0) -> Callable:
    """Mark a test as a property of this exercise. A core property gates the others' points."""

    def mark(function: Callable) -> Callable:
        function.property = Property(id, core, weight)
        return function

    return mark


def expect(condition, what: str, inputs: dict | None = None, expected=None, got=None) -> None:
    """Raise Mismatch unless the condition holds."""
    if not condition:
        raise Mismatch(what, inputs, expected, got)


def equal(
    got, expected, what: str = "another value than expected", inputs: dict | None = None,
    rtol: float = RTOL, atol: float = ATOL,
) -> None:  # fmt: skip
    """Raise Mismatch unless `got` is `expected`: numbers, tensors, strings, or tuples, lists and
    dicts of them. Tensors must have the expected shape and kind (float, int, bool), not the same
    dtype; a number equals a 0-dim tensor; NaN equals nothing."""
    if problem := _difference(got, expected, rtol, atol):
        raise Mismatch(f"{what}{problem}", inputs, expected, got)


def _difference(got, expected, rtol: float, atol: float) -> str:
    """ "" where the two agree, else the reason in words, beginning with ": " unless obvious."""
    if isinstance(expected, dict):
        if not isinstance(got, dict) or not expected.keys() <= got.keys():
            return f": it must be a dict with {sorted(expected)}"
        pairs = [(got[key], expected[key]) for key in expected]
    elif isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            size = len(got) if isinstance(got, (tuple, list)) else type(got).__name__
            return f": {len(expected)} values must come back, not {size}"
        pairs = list(zip(got, expected, strict=True))
    elif isinstance(expected, (Tensor, float, int)) and not isinstance(expected, bool):
        return _tensor_difference(got, expected, rtol, atol)
    else:
        return "" if type(got) is type(expected) and got == expected else " "
    return next((d for pair in pairs if (d := _difference(*pair, rtol, atol))), "")


def _tensor_difference(got, expected, rtol: float, atol: float) -> str:
    if not isinstance(got, (Tensor, float, int)):
        return f": it must be a tensor or a number, not {type(got).__name__}"
    g, e = (torch.as_tensor(x).detach().cpu() for x in (got, expected))
    if g.shape != e.shape:
        return f": the shape must be {tuple(e.shape)}, not {tuple(g.shape)}"
    if isinstance(expected, Tensor) and _kind(g) != _kind(e):
        return f": it must be {_kind(e)}, not {_kind(g)}"
    if torch.allclose(g.double(), e.double(), rtol=rtol, atol=atol):
        return ""
    return ": not finite" if not torch.isfinite(g.double()).all() else " "


def _kind(x: Tensor) -> str:
    if x.is_floating_point():
        return "floating point"
    return "bool" if x.dtype == torch.bool else "integer"


# -------------------------------------------------------------------------------- calling an answer


def own(value):
    """A copy that the answer may do with what it likes; of tensors without their gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(own, value))
    return copy.deepcopy(value)


def _named(function: Callable, args: Sequence, kwargs: dict) -> dict:
    """{parameter: value} of a call, as far as the signature tells."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {i + 1}" for i in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def call(function: Callable, args: Sequence, kwargs: dict | None = None):
    """function(*args, **kwargs) on copies. Mismatch when it raises or changes an input in place."""
    kwargs = kwargs or {}
    own_args, own_kwargs = [own(a) for a in args], {k: own(v) for k, v in kwargs.items()}
    inputs = _named(function, args, kwargs)
    got = _guarded(function, own_args, own_kwargs, inputs)
    for name, before, after in zip(
        inputs, (*args, *kwargs.values()), (*own_args, *own_kwargs.values()), strict=True
    ):
        if changed(before, after):
            raise Mismatch(f"it changed its input {name} in place", inputs, before, after)
    return got


def changed(before, after) -> bool:
    """True where an input, or what a list, tuple or dict of inputs holds, is not what it was."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        before, after = (torch.nan_to_num(x.detach().double(), nan=7.25) for x in (before, after))
        return not torch.equal(before, after)
    if type(before) is not type(after):
        return True
    if isinstance(before, dict):
        return before.keys() != after.keys() or any(changed(before[k], after[k]) for k in before)
    if isinstance(before, (tuple, list)):
        return len(before) != len(after) or any(map(changed, before, after))
    return isinstance(before, (int, str)) and before != after


def unwritten(error: BaseException) -> bool:
    """True for the `raise NotImplementedError` of a blank. torch raises this error too, of an
    operation that a dtype does not have, but never without a text."""
    return isinstance(error, NotImplementedError) and not str(error)


def _guarded(function: Callable, args: Sequence, kwargs: dict, inputs: dict):
    try:
        return function(*args, **kwargs)
    except Mismatch:
        raise
    except (Exception, SystemExit) as error:
        if unwritten(error):
            raise
        text = f"{type(error).__name__}: {error}"
        raise Mismatch("it raised an error", inputs, "a result", text) from error


def same(
    function: Callable, args: Sequence, expected, kwargs: dict | None = None,
    what: str = "another result than expected", rtol: float = RTOL, atol: float = ATOL,
    pick: Callable = lambda out: out, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """The call's result, or what `pick` takes of it, equals `expected` (see `equal`).

    dtype: what the (first) result tensor must have, where the docstring promises it.
    """
    got = pick(call(function, args, kwargs))
    inputs = _named(function, args, kwargs or {})
    equal(got, expected, what, inputs, rtol, atol)
    first = next(tensors_of(got), None)
    if dtype is not None and (first is None or first.dtype != dtype):
        raise Mismatch("another dtype than expected", inputs, dtype, getattr(first, "dtype", None))


def raises(function: Callable, args: Sequence, error=ValueError, kwargs: dict | None = None):
    """The call raises this error."""
    inputs = _named(function, args, kwargs or {})
    try:
        got = function(*[own(a) for a in args], **(kwargs or {}))
    except (Exception, SystemExit) as raised:
        if unwritten(raised):
            raise
        if isinstance(raised, error):
            return
        got = f"{type(raised).__name__}: {raised}"
    raise Mismatch("it should refuse this input", inputs, error.__name__, got)


def tensors_of(value) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def gradients(
    function: Callable, args: Sequence, kwargs: dict | None = None, wrt: Sequence[int] = (0,),
    pick: Callable = lambda out: out, double: bool = False,
) -> tuple[object, list[Tensor]]:  # fmt: skip
    """(result, its vector-Jacobian products by the arguments `wrt`).

    The cotangents are random, but the same for every function called with results of these shapes.
    What no gradient reaches gets zeros. double: float arguments become float64 (for an oracle).
    """
    mine = [own(a) for a in args]
    if double:
        mine = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in mine]
    for i in wrt:
        mine[i].requires_grad_(True)
    kwargs = {k: own(v) for k, v in (kwargs or {}).items()}
    got = pick(_guarded(function, mine, kwargs, _named(function, args, kwargs)))
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for out in tensors_of(got):
        if out.is_floating_point():
            cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64) + 0.5
            if out.requires_grad:  # drawn all the same, so that every output keeps its own
                total = total + (out.double() * cotangent).sum()
    leaves = [mine[i] for i in wrt]
    found = [None] * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return got, grads


def agrees(
    function: Callable, oracle: Callable, args: Sequence, kwargs: dict | None = None,
    wrt: Sequence[int] = (), what: str = "another result than expected",
    rtol: float = RTOL, atol: float = ATOL, pick: Callable = lambda out: out,
) -> None:  # fmt: skip
    """Value and gradient of the answer are those of an independent implementation.

    The oracle gets the same arguments with floats in float64 and returns what `pick` takes of the
    answer's result. wrt: positions of the arguments by which both are differentiated.
    """
    inputs = _named(function, args, kwargs or {})
    expected, wanted = gradients(oracle, args, kwargs, wrt, double=True)
    same(function, args, expected, kwargs, what, rtol, atol, pick)
    if not wrt:
        return
    _, found = gradients(function, args, kwargs, wrt, pick)
    names = list(inputs)
    for i, grad, want in zip(wrt, found, wanted, strict=True):
        scale = max(1.0, want.abs().max().item() if want.numel() else 1.0)
        if not torch.allclose(grad.double(), want, rtol=10 * rtol, atol=10 * atol * scale):
            raise Mismatch(f"the gradient by {names[i]} is another one", inputs, want, grad)


def finite(x) -> bool:
    """True when a number or every entry of a tensor is finite."""
    return math.isfinite(x) if isinstance(x, float) else bool(torch.isfinite(x).all())
