"""The golden test vectors: inputs and results computed with numpy alone."""

from __future__ import annotations

import json
from functools import cache

import torch

from rlhf_course.coursework import bank


def as_tensors(value):
    """JSON as it stands, but every rectangular list of numbers becomes a float64 tensor."""
    if isinstance(value, dict):
        return {key: as_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        try:
            return torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError):  # ragged, or not numbers
            return [as_tensors(item) for item in value]
    return value


class GoldenCase:
    """One case of data/golden.json, computed with numpy alone and compared with public systems.

    `inputs` and `expected` are dictionaries; `wrong` holds what common mistakes yield.
    """

    def __init__(self, case: dict):
        self.inputs, self.expected = as_tensors(case["inputs"]), as_tensors(case["expected"])
        self.wrong = as_tensors(case.get("known_wrong_values", {}))
        self.tol = case["tol"]

    def matches(self, actual, expected) -> None:
        """Assert equality, shape included, to the case's own tolerance."""
        actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=self.tol)

    def differs(self, actual, wrong) -> None:
        """Assert that somewhere the two are further apart than 1000 times the tolerance."""
        actual, wrong = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, wrong))
        assert actual.shape == wrong.shape, "a wrong value of another shape proves nothing"
        assert (actual.detach() - wrong).abs().max() > 1000 * self.tol, "a known wrong value"


@cache
def _cases() -> dict[str, dict]:
    text = (bank.folder() / "data" / "golden.json").read_text(encoding="utf-8")
    return {case["id"]: case for case in json.loads(text)["cases"]}


def golden(case_id: str) -> GoldenCase:
    """The case of this id: golden("G07")."""
    return GoldenCase(_cases()[case_id])
