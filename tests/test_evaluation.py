"""Chapter 07: win rates, calibration, best-of-n, honesty, diversity, perplexity."""

import itertools
import math
from collections import Counter

import pytest
import torch
from tiny_models import KINDS, VOCABULARY, tiny

from rlhf_course import evaluation as ev
from rlhf_course.sft import sft_loss

DOUBLE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ---------------------------------------------------------------------- one policy against another


@pytest.mark.parametrize(
    ("seen", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857-872, Table I, method 3 (Wilson)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_that_of_the_textbook(seen, count, low, high):
    found = ev.wilson_interval(seen / count, count)
    assert found == pytest.approx((low, high), abs=5e-5)
    mirrored = ev.wilson_interval(1 - seen / count, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_bounds_are_where_the_score_test_just_rejects(confidence):
    share, count = 0.3, 40
    z = {0.8: 1.2815516, 0.95: 1.9599640, 0.99: 2.5758293}[confidence]
    for bound in ev.wilson_interval(share, count, confidence):
        assert abs(share - bound) / math.sqrt(bound * (1 - bound) / count) == pytest.approx(z)


def test_wilson_interval_refuses_nonsense():
    for share, count, confidence in ((0.5, 0, 0.95), (0.5, 3, 1.0), (0.5, 3, 0.0)):
        with pytest.raises(ValueError, match="count >= 1"):
            ev.wilson_interval(share, count, confidence)
    assert ev.wilson_interval(1.0, 5)[1] == 1.0 and ev.wilson_interval(0.0, 5)[0] == 0.0


def test_win_rate_counts_a_tie_half():
    found = ev.win_rate([1.0, 2.0, 3.0, 0.5, 0.0], [0.0, 2.0, 4.0, 0.25, -1.0])
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    assert found.rate == 0.7
    assert (found.low, found.high) == pytest.approx((0.2988, 0.9274), abs=5e-5)
    narrower = ev.win_rate([1.0, 2.0, 3.0, 0.5, 0.0], [0.0, 2.0, 4.0, 0.25, -1.0], 0.5)
    assert found.low < narrower.low < 0.7 < narrower.high < found.high


def test_win_rate_is_one_minus_that_of_the_other():
    a, b = (draw(200, seed=s).round(decimals=1) for s in (1, 2))
    mine, theirs = ev.win_rate(a, b), ev.win_rate(b.tolist(), a.tolist())
    assert mine.ties == theirs.ties > 0 and mine.wins == theirs.losses != mine.losses
    assert mine.rate == pytest.approx(1 - theirs.rate, abs=1e-12)
    assert (mine.low, mine.high) == pytest.approx((1 - theirs.high, 1 - theirs.low), abs=1e-12)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert ev.win_rate(a[order], b[order]) == mine


def test_win_rate_tells_what_float32_would_call_a_tie():
    assert ev.win_rate([1.0 + 1e-9], [1.0]).wins == 1


def test_win_rate_refuses_what_cannot_be_compared():
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[2.0]])):
        with pytest.raises(ValueError, match="not \\(N,\\)"):
            ev.win_rate(a, b)
    for a, b in (([math.nan], [0.0]), ([0.0], [math.nan])):
        with pytest.raises(ValueError, match="NaN"):
            ev.win_rate(a, b)
    assert ev.win_rate([-math.inf], [0.0]).losses == 1


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        gold = (torch.rand(50, generator=generator) < 0.8).double()
        found = ev.win_rate(gold, torch.full((50,), 0.5))
        covered += found.low <= 0.8 <= found.high
    assert 0.93 < covered / 1000 < 0.97


# ---------------------------------------------------------------------- what a reward model knows


def test_preference_accuracy_golden(golden):
    case = golden("G11")
    chosen, rejected = case.inputs["chosen"], case.inputs["rejected"]
    found = ev.preference_accuracy(chosen, rejected)
    case.matches(found.accuracy, case.expected["accuracy_ties_half"])
    case.matches(found.strict, case.expected["accuracy_strict"])
    assert found.ties == 0.25
    case.differs(found.accuracy, case.expected["accuracy_strict"])
    margins = [0.5, -0.4, 0.0, 3.0]
    assert ev.reward_margin(chosen, rejected) == pytest.approx(sum(margins) / 4, abs=1e-12)


def test_a_model_that_knows_nothing_has_the_accuracy_of_a_coin():
    assert ev.preference_accuracy(torch.ones(6), torch.ones(6)) == (0.5, 0.0, 1.0)
    assert ev.preference_accuracy(torch.zeros(6), torch.ones(6)) == (0.0, 0.0, 0.0)
    for measure in (ev.preference_accuracy, ev.reward_margin):
        with pytest.raises(ValueError, match="not \\(N,\\)"):
            measure(torch.ones(2), torch.ones(3))
        with pytest.raises(ValueError, match="not \\(N,\\)"):
            measure(torch.ones(0), torch.ones(0))


PREDICTED = [0.05, 0.15, 0.18, 0.5, 0.55, 0.95, 1.0, 1.0]
HAPPENED = [0, 0, 1, 1, 0, 1, 1, 0]


def test_reliability_curve_by_hand():
    curve = ev.reliability_curve(PREDICTED, HAPPENED, bins=10)
    assert [b.count for b in curve] == [1, 2, 2, 3]  # 1.0 belongs to the last bin
    assert [b.predicted for b in curve] == pytest.approx([0.05, 0.165, 0.525, 2.95 / 3])
    assert [b.observed for b in curve] == pytest.approx([0, 0.5, 0.5, 2 / 3])
    two = ev.reliability_curve(PREDICTED, HAPPENED, bins=2)
    assert [b.count for b in two] == [3, 5]  # 0.5 belongs to the upper half


def test_calibration_error_by_hand():
    by_hand = (0.05 + 2 * (0.5 - 0.165) + 2 * (0.525 - 0.5) + 3 * (2.95 / 3 - 2 / 3)) / 8
    assert ev.expected_calibration_error(PREDICTED, HAPPENED) == pytest.approx(by_hand, abs=1e-12)
    # One bin: the difference of the two means.
    one = abs(sum(PREDICTED) / 8 - 4 / 8)
    assert ev.expected_calibration_error(PREDICTED, HAPPENED, 1) == pytest.approx(one, abs=1e-12)
    backwards = ev.expected_calibration_error(torch.tensor(PREDICTED[::-1]), HAPPENED[::-1])
    assert backwards == pytest.approx(by_hand, abs=1e-6)  # float32 predictions


def test_calibration_error_knows_a_calibrated_model_from_a_boastful_one():
    logits = 2 * draw(20_000)
    happened = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < logits.sigmoid()
    assert ev.expected_calibration_error(logits.sigmoid(), happened) < 0.015
    assert ev.expected_calibration_error((3 * logits).sigmoid(), happened) > 0.08
    assert ev.expected_calibration_error(torch.full((20_000,), 0.5), happened) < 0.01


def test_calibration_refuses_what_is_no_probability():
    for p, y in (([1.1], [1]), ([-0.1], [0]), ([math.nan], [1]), ([0.5], [0.5])):
        with pytest.raises(ValueError, match="0 or 1"):
            ev.expected_calibration_error(p, y)
    for p, y, bins in (([0.5], [1, 0], 10), ([], [], 10), ([0.5], [1], 0)):
        with pytest.raises(ValueError, match="not \\(N,\\)"):
            ev.expected_calibration_error(p, y, bins)


# --------------------------------------------------------------------------------------- best of n


def best_of_n_by_enumeration(proxy, gold, n):
    """Mean over every subset of n, and over the answers that tie for its best."""
    worths = []
    for scores, golds in zip(proxy.tolist(), gold.tolist(), strict=True):
        for subset in itertools.combinations(range(len(scores)), n):
            top = max(scores[i] for i in subset)
            best = [golds[i] for i in subset if scores[i] == top]
            worths.append(sum(best) / len(best))
    return sum(worths) / len(worths)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(n, ties):
    proxy, gold = draw(3, 7, seed=1), draw(3, 7, seed=2)
    if ties:
        proxy = proxy.round()
        assert all(len(set(row)) < 7 for row in proxy.tolist())
    expected = best_of_n_by_enumeration(proxy, gold, n)
    found = ev.best_of_n(proxy, gold, n)
    assert found.shape == () and found.dtype == DOUBLE
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_best_of_1_is_the_mean_and_best_of_all_the_best():
    proxy, gold = draw(4, 9, seed=1).float(), draw(4, 9, seed=2).float()
    assert ev.best_of_n(proxy, gold, 1).item() == pytest.approx(gold.double().mean().item())
    best = gold.gather(1, proxy.argmax(dim=1, keepdim=True)).double().mean().item()
    assert ev.best_of_n(proxy, gold, 9).item() == pytest.approx(best)
    assert ev.best_of_n(-proxy, gold, 9).item() != pytest.approx(best, abs=0.1)


def test_best_of_many_keeps_its_digits():
    proxy = draw(2, 600, seed=3)  # C(600, 300) is 10^179
    found = [ev.best_of_n(proxy, proxy, n).item() for n in (1, 4, 64, 300, 600)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(proxy.max(dim=1).values.mean().item())
    ordered = proxy.sort(dim=1).values
    weights = [math.comb(i, 299) / math.comb(600, 300) for i in range(600)]
    by_order = (ordered * torch.tensor(weights, dtype=DOUBLE)).sum(dim=1).mean().item()
    assert found[3] == pytest.approx(by_order, abs=1e-12)


def test_best_of_n_refuses_more_than_there_are():
    for n in (0, 4):
        with pytest.raises(ValueError, match="1 <= n <= N"):
            ev.best_of_n(torch.zeros(2, 3), torch.zeros(2, 3), n)
    with pytest.raises(ValueError, match="1 <= n <= N"):
        ev.best_of_n(torch.zeros(2, 3), torch.zeros(3, 2), 1)


def test_best_of_n_kl_is_that_of_the_chosen_ones_law():
    """Of n uniform draws the largest has density n u^(n-1) against 1: integrate its log."""
    grid = (torch.arange(1_000_000, dtype=DOUBLE) + 0.5) / 1_000_000
    for n in (2, 5, 64):
        density = n * grid ** (n - 1)
        integral = torch.xlogy(density, density).mean().item()
        assert ev.best_of_n_kl(n) == pytest.approx(integral, abs=1e-5)
    assert ev.best_of_n_kl(1) == 0
    with pytest.raises(ValueError, match="at least 1"):
        ev.best_of_n_kl(0)


# -------------------------------------------------------------------------------- what answers say


def test_exact_match_is_strict_but_for_outer_spaces():
    generated = [" in oslo .", "in  oslo .", "In oslo .", "in oslo", "in oslo .\n"]
    assert ev.exact_match(generated, ["in oslo ."] * 5) == 0.4
    with pytest.raises(ValueError, match="1 texts for 2"):
        ev.exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 texts"):
        ev.exact_match([], [])


def test_honesty_table_gives_shares_within_each_group():
    judged = [("known", "true")] * 3 + [("strangers", "idk")] * 4 + [("known", "false")]
    judged += [("strangers", "false")]
    table = ev.honesty_table(judged, ("true", "false", "idk", "bad"))
    assert table == {
        "known": {"true": 0.75, "false": 0.25, "idk": 0.0, "bad": 0.0},
        "strangers": {"true": 0.0, "false": 0.2, "idk": 0.8, "bad": 0.0},
    }
    assert list(table["known"]) == ["true", "false", "idk", "bad"]
    assert ev.honesty_table(iter(judged))["known"] == {"false": 0.25, "idk": 0.0, "true": 0.75}
    with pytest.raises(ValueError, match=r"\['idk'\] are not in"):
        ev.honesty_table(judged, ("true", "false"))
    assert ev.honesty_table([]) == {}


def test_distinct_n_by_hand():
    texts = ["the cat sat", "the cat ran", "the"]
    assert ev.distinct_n(texts, 1) == 4 / 7
    assert ev.distinct_n(texts, 2) == 3 / 4  # no bigram across two texts
    assert ev.distinct_n(iter(texts)) == 3 / 4
    assert ev.distinct_n(texts, 4) == 0.0
    assert ev.distinct_n(["a b a b a"], 2) == 2 / 4
    with pytest.raises(ValueError, match="at least 1"):
        ev.distinct_n(texts, 0)


def test_entropy_is_in_bits():
    assert ev.entropy("abcd") == pytest.approx(2.0)
    assert ev.entropy(["x"] * 9) == 0.0 and ev.entropy([]) == 0.0
    assert math.copysign(1, ev.entropy(["x"])) == 1  # not -0.0
    labels = [0] * 5 + [1] * 2 + ["other"]
    expected = -sum(c / 8 * math.log(c / 8) / math.log(2) for c in Counter(labels).values())
    assert ev.entropy(iter(labels)) == pytest.approx(expected, abs=1e-12)


# -------------------------------------------------------------------------- what has been forgotten


def test_perplexity_of_a_fair_die_is_six():
    assert ev.perplexity(30 * math.log(6), 30) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="no token"):
        ev.perplexity(1.0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_perplexity_is_over_every_token_but_a_rows_first(kind):
    model = tiny(kind).train()
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(VOCABULARY, (7, 11), generator=generator)
    with torch.no_grad():
        expected = math.exp(sft_loss(model(windows), windows).item())
    found = ev.corpus_perplexity(model, windows, batch_size=3)  # 3, 3 and 1 rows
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > 5
    assert model.training
    assert ev.corpus_perplexity(model.eval(), windows) == pytest.approx(found, rel=1e-5)
    assert not model.training


def test_corpus_perplexity_is_measured_without_dropout():
    model = tiny("gpt").train()
    model.drop.p = 0.5
    windows = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    assert ev.corpus_perplexity(model, windows) == ev.corpus_perplexity(model, windows)
    assert model.training
