"""benchmarks/peers/scaling.py: what is timed is the right work. No timings."""

import importlib
import json
import multiprocessing
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks

from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.stages.sft import as_batch, as_example, backward
from rlhf_course.training import make_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
scaling, cases, arena = (
    importlib.import_module(f"peers.{name}") for name in ("scaling", "cases", "arena")
)

CPU = torch.device("cpu")
LENGTHS = [(3, 9), (11, 2), (5, 5), (2, 17), (7, 1)]
"""(of the prompt, of the answer): an odd number of rows, and unlike numbers of labels."""


def tiny(dtype=torch.float64) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=29, context=24, layers=2, heads=2, width=8)).to(dtype)
    model.token_embedding.weight.data *= 20  # a gradient so large that it is clipped
    return model


def rows() -> list:
    draw = torch.Generator().manual_seed(0)
    return [as_example(*(torch.randint(3, 29, (n,), generator=draw).tolist() for n in both))
            for both in LENGTHS]  # fmt: skip


def flat(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def whole(model: GPT) -> tuple:
    return as_batch(rows(), model.context, 0, False)


def expected(dtype=torch.float64):
    """(mean loss, gradient), as the stage computes them."""
    model = tiny(dtype)
    loss = backward(model, whole(model), None, CPU)
    return loss, flat(model)


def weights(model: GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def share(rank: int, group) -> dict:
    """One rank's view: loss and gradient, and the weights after two updates."""
    assert dist.get_world_size(group) == 2
    out = {}
    for dtype in (torch.float32, torch.float64):
        model = tiny(dtype)
        loss = scaling.gradient(model, rows(), rank, 2)
        out[str(dtype)] = (loss, flat(model))
        optimizer = make_optimizer(model, 1e-2)
        said = [scaling.update(model, optimizer, rows(), rank, 2) for _ in range(2)]
        out[f"{dtype} after"] = (said, weights(model))
    return out


def test_two_processes_have_the_gradient_and_the_updates_of_one(tmp_path):
    ranks = on_two_ranks(share, tmp_path)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        loss, gradient = expected(dtype)
        assert gradient.abs().max() > 0.05
        for said in ranks:
            torch.testing.assert_close(said[str(dtype)][0], loss, rtol=tolerance, atol=0)
            torch.testing.assert_close(said[str(dtype)][1], gradient, rtol=0, atol=tolerance)
        first, second = (said[f"{dtype} after"] for said in ranks)
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])
    model = tiny()
    optimizer, losses = make_optimizer(model, 1e-2), []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(backward(model, whole(model), None, CPU).item())
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1  # so that it clips
        optimizer.step()
    assert first[0] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(first[1], weights(model), rtol=0, atol=1e-10)


def test_one_process_has_the_stages_gradient():
    model = tiny()
    loss = scaling.gradient(model, rows())
    wanted, gradient = expected()
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(flat(model), gradient, rtol=0, atol=1e-14)


def test_rows_are_dealt_by_length():
    parts = [scaling.dealt(rows(), rank, 2) for rank in range(2)]
    assert [[len(ids) for ids, _ in part] for part in parts] == [[19, 12, 8], [13, 10]]


def test_the_contestant_ends_its_second_process(tmp_path):
    shape = cases.SHAPES["0.2M long"]
    cases.write_models(tmp_path, ["0.2M long"])
    case = cases.Case("0.2M long", 3, 4, 4, updates=2, even=True, folder=str(tmp_path))
    told = []

    def turn(**units):
        told.append((units, multiprocessing.active_children()))
        if len(told) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        scaling.sft_on_two(case, turn)
    assert [units for units, _ in told] == [{}, {"tokens": 48}, {"tokens": 48}]
    (second,) = told[-1][1]
    assert second.exitcode == 0
    assert not dist.is_initialized()
    assert shape.numbers == sum(p.numel() for p in GPT.from_pretrained(case.model()).parameters())


def test_slope_is_the_exponent():
    xs = [0.5, 2.0, 3.0, 700.0]
    assert scaling.slope(xs, [3 * x**1.7 for x in xs]) == pytest.approx(1.7, abs=1e-12)
    assert scaling.slope(xs, [0.2 * x**-0.5 for x in xs]) == pytest.approx(-0.5, abs=1e-12)
    ys = [4.0, 1.0, 7.0, 2.5]
    fitted = np.polyfit(np.log(xs), np.log(ys), 1)[0]
    assert scaling.slope(xs, ys) == pytest.approx(fitted, abs=1e-12)


@pytest.mark.parametrize(
    "xs, ys", [([1, 2], [0, 1]), ([-1, 2], [1, 1]), ([2, 2], [1, 3]), ([], [])]
)
def test_slope_wants_positive_numbers_at_different_places(xs, ys):
    with pytest.raises(ValueError):
        scaling.slope(xs, ys)


def test_a_curve_tells_medians_pieces_and_the_spread_over_repeats():
    # Three repeats: y = x, y = 2 x, and one whose piece from 2 to 8 is flat.
    said = scaling.curve([1, 2, 8], [[1, 2, 1], [2, 4, 2], [8, 16, 2]])
    assert said["points"] == [
        {"x": 1, "seconds": {"median": 1, "min": 1, "max": 2}},
        {"x": 2, "seconds": {"median": 2, "min": 2, "max": 4}},
        {"x": 8, "seconds": {"median": 8, "min": 2, "max": 16}},
    ]
    assert said["slope"] == pytest.approx(1, abs=1e-12)
    assert said["pieces"] == pytest.approx([1, 1], abs=1e-12)
    # By hand, in units of log 2: x = 0, 1, 3 about 4/3; y = 0, 1, 1 about 2/3.
    flat = (4 / 3 * 2 / 3 - 1 / 3 * 1 / 3 + 5 / 3 * 1 / 3) / (16 / 9 + 1 / 9 + 25 / 9)
    assert said["slopes"] == pytest.approx({"median": 1, "min": flat, "max": 1}, abs=1e-12)


def test_times_are_repeat_for_repeat():
    assert scaling.times([4.0, 9.0], {scaling.ALONE: [2.0, 3.0], "other": [1.0, 1.0]}) == [2, 3]


def test_only_one_quantity_is_varied():
    sweeps = scaling.sweeps("models")

    def work(case) -> dict:
        return {**vars(case), "tokens": case.rows * (case.prompt + case.answer)}

    varied = {
        "sft, model": {"size"}, "sft, batch": {"rows", "tokens"},
        "sft, context": {"rows", "prompt", "answer"},  # as many tokens in fewer, longer rows
        "rollout, answers": {"answer", "tokens"}, "rollout, batch": {"rows", "tokens"},
    }  # fmt: skip
    assert set(sweeps) == set(varied)
    for name, sweep in sweeps.items():
        assert [x for x, _ in sweep.points] == sorted({x for x, _ in sweep.points})
        for (_, a), (_, b) in pairwise(sweep.points):
            a, b = work(a), work(b)
            assert {k for k in a if a[k] != b[k]} - {"updates"} == varied[name]
        for x, case in sweep.points:
            assert case.even and case.prompt + case.answer <= case.shape.context
            seen = {
                "parameters": case.shape.numbers,
                "tokens a row": case.prompt + case.answer,
                "rows": case.rows,
                "tokens an answer": case.answer,
                "prompts": case.rows,
            }
            assert seen[sweep.quantity] == x


@pytest.fixture
def contests(monkeypatch) -> list:
    """The contests that are asked for, each of which has made-up results and takes no time."""
    asked = []

    def contest(entries, repeats, unit, say):
        asked.append(entries)
        out = {}
        for entry in entries:  # an update takes its tokens in ms, a rollout twice its own
            case, turn = entry.case, arena.Turns(entry.threads[0])
            tokens = case.rows * (case.prompt + case.answer) * case.updates
            per_token = 0.001 if "sft" in entry.function else 0.002 / case.updates
            faster = {"1 process x 2 threads": 2, "2 processes x 1 thread": 1.5}.get(entry.name, 1)
            turn.seconds = [tokens * per_token * (1 + i) / faster for i in range(repeats)]
            turn.units = [{unit: tokens}] * repeats
            out[entry.name] = turn
        return out

    monkeypatch.setattr(scaling, "contest", contest)
    monkeypatch.setattr(scaling, "write_models", lambda folder, sizes: None)
    return asked


def test_growth_tells_seconds_of_an_update_and_of_a_rollout(contests, tmp_path):
    lines = []
    out = json.loads(json.dumps(scaling.growth(tmp_path, 3, lines.append)))
    assert len(lines) == len(out) == len(contests) == 5
    assert {entry.threads for entries in contests for entry in entries} == {(1,)}
    assert {entry.case.folder for entries in contests for entry in entries} == {str(tmp_path)}
    batch = out["sft, batch"]
    assert batch["points"][0]["x"] == 4
    # 4 rows of 64 tokens; the repeats take once, twice and three times as long
    wanted = {"median": 0.512, "min": 0.256, "max": 0.768}
    assert batch["points"][0]["seconds"] == pytest.approx(wanted, rel=1e-12)
    assert batch["slope"] == pytest.approx(1, abs=1e-12)
    assert out["sft, context"]["slope"] == pytest.approx(0, abs=1e-12)
    first = out["rollout, answers"]["points"][0]
    assert first["x"] == 16
    assert first["seconds"]["min"] == pytest.approx(0.002 * 16 * (32 + 16), rel=1e-12)


def test_processes_are_compared_with_one_thread(contests, tmp_path):
    out = json.loads(json.dumps(scaling.processes(tmp_path, 3, print)))
    assert [[e.threads for e in entries] for entries in contests] == [[(1,), (2,), (1,)]] * 2
    for entries in contests:  # the same work for all
        assert len({entry.case for entry in entries}) == 1
    for told in out["sizes"].values():
        ways = told["ways"]
        ratios = [way["times_alone"]["median"] for way in ways.values()]
        assert ratios == pytest.approx([1, 2, 1.5], rel=1e-12)
        rate = ways[scaling.ALONE]["tokens_per_second"]
        assert rate == pytest.approx({"median": 500, "min": 1000 / 3, "max": 1000}, rel=1e-12)


def test_models_are_written_once(monkeypatch, tmp_path):
    (tmp_path / "0.8M" / "reward").mkdir(parents=True)
    written, one = [], arena.Turns(1, [1.0], [{"tokens": 1}])
    monkeypatch.setattr(scaling, "contest", lambda entries, *_: {e.name: one for e in entries})
    monkeypatch.setattr(scaling, "write_models", lambda folder, sizes: written.append(sizes))
    scaling.processes(tmp_path, 1, print)
    assert written == [["10M"]]
