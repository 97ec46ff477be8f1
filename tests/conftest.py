"""What every test shares: one thread (the machine may be small), no network.

The fixtures `golden`, `subject` and `rng` come from rlhf_course.coursework.plugin.
"""

import json
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

torch.set_num_threads(1)


@pytest.fixture
def write(tmp_path):
    """write(row, row, …) -> a JSON-lines file of them; a text stands as it is."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
