"""benchmarks/bench.py: everybody gets the same work and its own turn. No timings of ours."""

import copy
import importlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
arena, cases, limit, table, operations = (
    importlib.import_module(name)
    for name in ("peers.arena", "peers.cases", "peers.limit", "peers.table", "operations")
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
CASE = cases.Case("0.8M", rows=8, prompt=20, answer=12)


def entry(name, function, **settings):
    return arena.Entry(name, f"contestants:{function}", CASE, settings)


@needs_linux
def test_contestants_take_turns_in_processes_of_their_own(tmp_path):
    log, said = tmp_path / "log", []
    entries = [entry(str(s), "waits", seconds=s, log=str(log)) for s in (0.05, 0.1)]
    found = arena.contest(entries, 3, "tokens", said.append)
    rows = [line.split() for line in log.read_text().splitlines()]
    assert len({row[1] for row in rows}) == 2
    spans = sorted((float(row[3]), float(row[4])) for row in rows)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))  # never two at once
    order = [row[0] for row in rows][-6:]
    assert order == ["0.05", "0.1", "0.1", "0.05", "0.05", "0.1"]  # who begins changes
    for name, turns in found.items():
        assert len(turns.seconds) == 3 and turns.peak_bytes > 10_000_000
        assert float(name) <= min(turns.seconds) < float(name) + 0.5
        assert turns.rates("tokens") == [10 / s for s in turns.seconds]
        assert turns.told("tokens")["rate"]["median"] == sorted(turns.rates("tokens"))[1]
    assert len(said) == 2


@needs_linux
def test_everybody_gets_the_number_of_threads_that_suits_it():
    one = arena.Entry("one", "contestants:prefers_one_thread", CASE, threads=(3, 1, 2))
    assert arena.contest([one], 1, "tokens", lambda text: None)["one"].threads == 1


@needs_linux
def test_a_contest_ends_whatever_a_trainer_catches():
    found = arena.contest([entry("a", "calls_back")], 1, "tokens", lambda text: None)
    assert found["a"].units == [{"tokens": 1}]


@needs_linux
def test_what_a_contestant_said_last_is_told_when_it_dies():
    with pytest.raises(RuntimeError, match=r"unlucky on Case[\s\S]*out of luck"):
        arena.contest([entry("unlucky", "fails")], 2, "tokens", lambda text: None)


def test_the_work_is_the_same_for_all_and_as_it_is_described():
    case = cases.Case("0.8M", rows=8, prompt=96, answer=64)
    again = cases.Case("0.8M", rows=8, prompt=96, answer=64, dtype="bfloat16", folder="elsewhere")
    rows = case.dialogues(2000)
    assert rows == again.dialogues(2000) and rows[:50] == case.dialogues(50)
    prompts, answers = ([len(x) for x in column] for column in zip(*rows, strict=True))
    assert (min(prompts), max(prompts)) == (48, 144) and max(answers) == 256 and min(answers) == 1
    assert sum(prompts) / 2000 == pytest.approx(96, rel=0.03)
    assert sum(answers) / 2000 == pytest.approx(64, rel=0.05)  # cut at four times the mean
    assert all(cases.FIRST <= t < 1280 for p, a in rows[:50] for t in p + a)
    even = cases.Case("0.8M", rows=8, prompt=32, answer=64, even=True)
    assert set(even.lengths(9)) == {(32, 64)}
    for (prompt, chosen, rejected), (same, first) in zip(
        case.pairs(5), case.dialogues(5), strict=True
    ):
        assert prompt == same and chosen == first != rejected


def test_answers_end_as_often_as_they_are_to(tmp_path):
    """The policy of PPO's second kind of work: 400 answers of 48 tokens in the mean, +- 2.4."""
    from rlhf_course.gpt import GPT
    from rlhf_course.sampling import generate

    cases.write_models(tmp_path, ["0.8M"], {"0.8M": 48})
    case = cases.Case("0.8M", 400, 8, 48, even=False, most=128, folder=str(tmp_path))
    policy, prompts = GPT.from_pretrained(case.model("ending")), [p for p, _ in case.dialogues(400)]
    said = generate(policy, prompts, 500, cases.EOS, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([float(len(response)) for response in said.responses])
    assert all(said.finished) and abs(lengths.mean() - 48) < 6 and abs(lengths.std() - 48) < 12
    assert case.longest == 128 and not GPT.from_pretrained(case.model()).final_norm.bias.any()


@pytest.mark.parametrize("size", ["0.8M", "10M", "124M"])
def test_a_shape_has_the_parameters_of_its_name(size):
    from rlhf_course.gpt import GPT, GPTConfig

    shape = cases.SHAPES[size]
    with torch.device("meta"):
        model = GPT(GPTConfig(shape.vocabulary, shape.context, shape.layers, shape.heads,
                              shape.width))  # fmt: skip
    numbers = sum(p.numel() for p in model.parameters())
    assert shape.numbers == numbers == pytest.approx(float(size[:-1]) * 1e6, rel=0.04)


def test_operations_are_those_that_torch_counts(tmp_path):
    """Without attention: that is what 6 N leaves out."""
    from rlhf_course.gpt import GPT, GPTConfig
    from rlhf_course.stages.sft import as_batch, as_example, backward

    case = cases.Case("0.8M", rows=4, prompt=24, answer=8, updates=1, even=True)
    shape = case.shape
    model = GPT(GPTConfig(shape.vocabulary, shape.context, shape.layers, shape.heads, shape.width))
    batch = as_batch([as_example(p, a) for p, a in case.dialogues(4)], 512, 1, False)
    counted = operations.flops(lambda: backward(model, batch, None, torch.device("cpu")))
    attention = 3 * shape.layers * 4 * 4 * 32 * 32 * shape.width  # 4 rows; both products; forward 1
    done = limit.done_operations(case) * 4 * 32
    done += 6 * (shape.vocabulary) * shape.width  # one more row of logits, which ends the text
    assert counted == pytest.approx(done + attention, rel=1e-9)
    assert limit.training_operations(case) > limit.done_operations(case)


RESULTS = {
    "repeats": 3,
    "machine": {"cores": 2, "processor": "a processor", "versions": {"torch": "2.13.0", "x": None}},
    "parts": {
        "sft": [{
            "name": "SFT 10M float32", "unit": "tokens", "case": CASE.told(),
            "found": {
                "ours": {"rate": {"median": 3000.0}, "peak_bytes": 500, "rates": [3.0, 4.0, 9.0]},
                "TRL": {"rate": {"median": 1500.0}, "peak_bytes": 1000,
                        "ours": table.median_ratio([3.0, 4.0, 9.0], [2.0, 1.0, 3.0])},
            },
            "limit": {"operations_per_second": {"median": 3e11}, "all logits": 0.66, "done": 0.6},
        }],
        "scaling": {
            "growth": {"sft, batch": {
                "quantity": "rows", "slope": 0.9, "slopes": {"min": 0.8, "max": 0.95},
                "points": [{"x": x, "seconds": {"median": 0.01 * x}} for x in (4, 1024)],
            }},
            "processes": {"sizes": {"10M": {"ways": {
                "1 process x 1 thread": {"times_alone": {"median": 1.0, "min": 1.0, "max": 1.0}},
                "1 process x 2 threads": {"times_alone": {"median": 1.8, "min": 1.7, "max": 1.9}},
                "2 processes x 1 thread": {"times_alone": {"median": 2.0, "min": 1.9, "max": 2.1}},
            }}}},
        },
        "demo": {"seconds": 270.0, "memory_gb": 1.2, "bars": [{"met": True}, {"met": False}]},
    },
}  # fmt: skip


def test_the_table_says_what_the_results_say():
    text = table.markdown(RESULTS)
    line = "| SFT 10M fp32 | TRL | 3,000 | 1,500 | tokens/s | **3.00** (1.50 … 4.00) | 0.50 |"
    assert line in text.splitlines()
    assert "| 0.8M fp32 | 300 | 66% | 60% |" in text
    assert "| sft, rows | 4 | 1,024 | 0.04 … 10.2 | 0.90 (0.80 … 0.95) |" in text
    assert "| 1 process x 2 threads | 2 processes x 1 thread |" in text
    assert "| 10M | 1.80 (1.70 … 1.90) | 2.00 (1.90 … 2.10) |" in text
    assert "4.5 minutes, 1 of 2 bars met, 1.20 GB" in text
    assert "2 cores of a processor; torch 2.13.0; medians of 3 turns" in text


def test_the_table_goes_between_the_marks(tmp_path, monkeypatch):
    bench = importlib.import_module("bench")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(bench, "README", readme)
    for _ in range(2):
        bench.write_table(copy.deepcopy(RESULTS))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- bench -->\n| work |") and text.endswith("<!-- /bench -->\nb\n")
    assert "old" not in text and text.count("SFT 10M fp32") == 1


def test_a_run_writes_the_table_of_its_file_and_drops_what_another_machine_measured(
    tmp_path, monkeypatch, capsys
):
    bench = importlib.import_module("bench")
    held = json.loads(bench.RESULTS.read_text())
    growth = dict(reversed(held["parts"]["scaling"]["growth"].items()))  # as measured, unsorted
    scaling = {**held["parts"]["scaling"], "growth": growth}
    results, readme = tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text("a\n<!-- bench -->\n<!-- /bench -->\nb\n")
    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "README", readme)
    monkeypatch.setattr(bench, "write_models", lambda *_: None)
    monkeypatch.setattr(bench, "PARTS", {"sft": None, "scaling": lambda *_: scaling})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "scaling"])
    for cores, parts in ((bench.machine()["cores"], {"sft", "scaling"}), (99, {"scaling"})):
        machine = {**bench.machine(), "cores": cores}
        old = {"machine": machine, "parts": {"sft": held["parts"]["sft"]}, "repeats": 5}
        results.write_text(json.dumps(old))
        bench.main()
        found = json.loads(results.read_text())
        assert set(found["parts"]) == parts
        assert found["machine"] == bench.machine()
        assert bench.markdown(found) in readme.read_text()
        assert ("left out" in capsys.readouterr().out) == (parts == {"scaling"})


def test_the_readme_shows_the_results_that_lie_beside_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert set(results["parts"]) == set(importlib.import_module("bench").PARTS)
    names = [contest["name"] for contest in results["parts"]["ppo"]]
    assert len(names) == len(set(names)) == 2 * 2 * 2  # sizes, dtypes, answers alike or not
    assert table.markdown(results) in (ROOT / "README.md").read_text(encoding="utf-8")
