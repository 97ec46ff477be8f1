"""The figures of chapter 9: what they draw is what they were given."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from rlhf_course.distributed.placement import place
from rlhf_course.planning.memory import zero_bytes
from rlhf_course.plots import lessons_distributed as draw


def labelled(figure):
    """Every axis that is drawn on says what it shows, with units."""
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    return all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)


def bars(ax):
    """(left, bottom, width, height) of every bar."""
    return [tuple(np.round(bar.get_bbox().bounds, 6)) for bar in ax.patches]


def lines(ax):
    return [np.array(line.get_data(), dtype=float) for line in ax.lines]


def timing(rollout, engine, scoring=1.0, update=2.0, sync=0.5):
    return {"rollout_seconds": rollout, "engine_seconds": engine, "scoring_seconds": scoring,
            "update_seconds": update, "sync_seconds": sync}  # fmt: skip


def test_phases_stack_up_and_the_share_is_generations():
    measured = {8: {"generation": 1.0, "scoring": 1.0, "update": 2.0},
                16: {"generation": 3.0, "scoring": 1.0, "update": 2.0}}  # fmt: skip
    figure = draw.phases_over_length("here", measured, 0.1)
    assert labelled(figure)
    left, right = figure.axes
    tops = [bottom + height for _, bottom, _, height in bars(left)]
    assert max(tops) == pytest.approx(6)
    assert any(np.allclose(line, [[0, 1], [0.25, 0.5]]) for line in lines(right))


def test_partitions_stand_beside_the_formula():
    formula = {stage: zero_bytes(1_000_000, stage, 2) for stage in range(4)}
    figure = draw.zero_partitions({3: formula[3]}, formula)
    assert labelled(figure)
    ax = figure.axes[0]
    assert len(ax.patches) == 3 * 5  # four stages, one of them measured
    assert sorted(text.get_text() for text in ax.texts) == ["10.0", "16.0", "8.0", "8.0", "9.0"]


def test_memory_over_gpus_is_what_is_given_on_logarithmic_axes():
    held = {"ZeRO-3": [100.0, 50.0, 25.0]}
    figure = draw.memory_per_gpu({"7B": held, "70B": held}, (1, 2, 4), 80.0)
    assert labelled(figure)
    for ax in figure.axes:
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert np.allclose(lines(ax)[0], [[1, 2, 4], [100, 50, 25]])


def test_bundles_show_every_rank_and_its_share():
    roles = {"actor": 2, "critic": 2, "rollout": 2}
    layouts = {"together": place(roles, 2, True), "apart": place(roles, 2, False)}
    figure = draw.bundles(layouts)
    assert labelled(figure)
    together, apart = figure.axes
    assert len(together.patches) == len(apart.patches) == 6
    assert {text.get_text() for text in together.texts} == {
        f"{role} {rank}" for role in roles for rank in range(2)
    }
    assert max(bottom + height for _, bottom, _, height in bars(together)) <= 1
    assert [line[0][0] for line in lines(apart)] == [2, 4]  # borders of nodes


def test_static_batches_wait_for_their_longest_and_continuous_ones_do_not():
    lengths = [1, 5, 2, 2]
    assert draw.schedule(lengths, 2, True) == [(0, 0, 1), (1, 0, 5), (0, 5, 2), (1, 5, 2)]
    assert draw.schedule(lengths, 2, False) == [(0, 0, 1), (1, 0, 5), (0, 1, 2), (0, 3, 2)]
    figure = draw.slots(lengths, 2)
    assert labelled(figure)
    static, continuous = (ax.get_title(loc="left") for ax in figure.axes)
    assert "7 steps, 71% of them used" in static
    assert "5 steps, 100% of them used" in continuous
    for ax in figure.axes:
        widths = [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]
        assert sum(widths) - max(widths) == pytest.approx(sum(lengths))  # one is the background


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_no_slot_writes_two_answers_at_a_time(slots):
    lengths = np.random.default_rng(0).integers(1, 20, 40).tolist()
    for static in (True, False):
        placed = draw.schedule(lengths, slots, static)
        assert [n for _, _, n in placed] == lengths
        for slot in range(slots):
            mine = sorted((start, start + n) for where, start, n in placed if where == slot)
            assert all(end <= start for (_, end), (start, _) in pairwise(mine))


def test_ratios_are_sorted_and_never_minus_infinity():
    figure = draw.ratios({"fp32": [0.0, -0.2, 0.1]}, clip=0.2)
    assert labelled(figure)
    assert np.allclose(lines(figure.axes[0])[0][1], [1e-9, 0.1, 0.2])


def test_in_step_the_lanes_take_turns_and_one_step_off_they_overlap():
    in_step = [timing(4.0, 4.0)] * 4
    ahead = [timing(4.0, 4.0), *[timing(1.0, 4.0)] * 3]
    figure = draw.lanes({"in step": (in_step, 0), "ahead": (ahead, 1)}, range(1, 3))
    assert labelled(figure)
    engines = [[b for b in bars(ax) if b[1] < 0.5] for ax in figure.axes]  # left, bottom, width
    trainers = [[b for b in bars(ax) if b[1] > 0.5] for ax in figure.axes]

    def together(a, b):
        return max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))

    overlaps = [
        sum(together(a, b) for a in some for b in others)
        for some, others in zip(engines, trainers, strict=True)
    ]
    assert overlaps[0] == 0
    assert overlaps[1] > 3
    assert [bar[0] for bar in engines[0]] == pytest.approx([0, 7.5])
    assert figure.axes[0].get_xlim() == pytest.approx((0, 15))


def test_learning_draws_what_a_run_has():
    rows = [{"step": i, "gold": 0.1 * i, "staleness": 1, "rollout_kl": 1e-3} for i in range(6)]
    alone = [{"step": i, "gold": 0.2 * i} for i in range(6)]
    figure = draw.learning({"one process": alone, "cluster": rows}, batch=64)
    assert labelled(figure)
    gold, age, gap = figure.axes
    assert gold.lines[0].get_xdata()[-1] == 6 * 64
    assert np.allclose(lines(age)[-1][1], 1)
    assert np.allclose(lines(gap)[-1][1], 1e-3)


def test_rates_count_useful_tokens():
    figure = draw.engine_times({"static": [2.0, 4.0], "continuous": [1.0]}, tokens=100)
    assert labelled(figure)
    points = [line[0].tolist() for line in lines(figure.axes[0])]
    assert points == [[50.0, 25.0], [100.0]]
