"""What every test shares: one thread (the machine may be small), no network, the golden vectors."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "data" / "golden.json"


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


@pytest.fixture(scope="session")
def golden():
    """golden("G07") -> that GoldenCase."""
    cases = {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}
    return lambda case_id: GoldenCase(cases[case_id])
