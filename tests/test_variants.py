"""Variants: what is printed, what is graded, and whether right and wrong are still told apart."""

import ast
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

from rlhf_course import check
from rlhf_course.coursework import build, execute, extract, manuscript, notebook, source, variants
from rlhf_course.coursework.exercises import EXERCISES, find
from rlhf_course.coursework.mutants import alike, mutants_of
from rlhf_course.coursework.subject import Subject, answer_from
from rlhf_course.coursework.trial import properties, run, title
from rlhf_course.coursework.variant_forms import Variant, rolled
from rlhf_course.coursework.variant_texts import VARIANTS
from rlhf_course.errors import ConfigError

ROOT = Path(__file__).parents[1]
SEEDS = int(os.environ.get("EXERCISE_SEEDS", "3"))  # 200 take half a minute
IDS = [exercise.id for exercise in EXERCISES]
VARIED = sorted({variant.exercise for variant in VARIANTS})
each = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.exercise} {v.name}")


def try_text(variant, text, seed=0):
    """The outcomes that count of an answer to a variant, as source."""
    exercise = find(variant.exercise)
    return variants.try_variant(exercise, variant, answer_from(exercise, text), seed)[1]


def failed(outcomes):
    return {outcome.title for outcome in outcomes if not outcome.passed}


# --------------------------------------------------------------------------------------- choosing


def test_the_seed_alone_chooses():
    both = variants.choose(3, IDS)
    assert both == variants.choose(3, IDS)
    for id in VARIED:
        assert variants.choose(3, [id]) == {id: both[id]}, "the others have a say in it"
    assert {id for id, variant in both.items() if variant} == set(VARIED)


def test_a_seed_stands_for_the_same_variants_for_ever():
    """A class may be graded long after its chapters were printed."""
    names = {id: variant.name for id, variant in variants.choose(3, VARIED).items()}
    assert names == {
        "mdp.action_mask": "left",
        "mdp.gae": "bootstrap",
        "mdp.kl_estimate": "k2",
        "ppo.whiten": "no shift",
        "reward_model.mean_reward": "left",
    }
    assert variants.choose(14, ["mdp.kl_estimate"])["mdp.kl_estimate"].name == "k3"


def test_every_variant_comes_up_and_padding_is_the_same_everywhere():
    seen = set()
    for seed in range(40):
        chosen = variants.choose(seed, VARIED)
        seen |= set(chosen.values())
        assert chosen["mdp.action_mask"].name == chosen["reward_model.mean_reward"].name
    assert seen == set(VARIANTS)


def test_a_variant_is_found_by_its_name():
    assert variants.find("ppo.whiten", "shift").says.startswith("the mean is always taken out")
    with pytest.raises(ConfigError, match=r"no variant 'k4'\. There are: 'k1', 'k2', 'k3'"):
        variants.find("mdp.kl_estimate", "k4")
    with pytest.raises(ConfigError, match="There are: none"):
        variants.find("sft.pack", "left")


# ------------------------------------------------------------------------------ what students get


@each
def test_a_blank_says_what_is_asked_and_holds_no_answer(variant):
    blank, solved = (
        source.blank(variant.exercise, variant),
        source.solved(variant.exercise, variant),
    )
    found = source.definition(variant.exercise, variant)
    assert blank == "\n".join([found.head, found.indent + source.BLANK, found.tail])
    assert solved == "\n".join([found.head, found.answer, found.tail])
    assert found.answer.strip()
    assert all(line.startswith(found.indent) for line in found.answer.splitlines())
    function = ast.parse(blank).body[0]
    names = [argument.arg for argument in function.args.args]
    assert ast.get_docstring(function)
    for text in (blank, solved):
        assert max(map(len, text.splitlines())) <= 100, "too wide to be read"
    assert names == list(inspect.signature(variants.solution(variant)).parameters)
    assert variant.says.endswith(".")
    assert variant.says.partition(" ")[0].islower(), "it goes on behind 'In this version: '"
    assert len(variant.hints) in (0, 2, 3)
    assert bool(variant.after) is not variant.usual


def test_the_signatures():
    def of(id, name):
        return list(inspect.signature(variants.solution(variants.find(id, name))).parameters)

    for kind in ("k1", "k2", "k3"):
        assert of("mdp.kl_estimate", kind) == ["logprobs", "ref_logprobs"]
    for name in ("shift", "no shift"):
        assert of("ppo.whiten", name) == ["x", "mask", "eps", "group"]
    wanted = ["rewards", "values", "mask", "last_values", "gamma", "lam"]
    assert of("mdp.gae", "bootstrap") == wanted


@each
def test_what_a_variant_says_otherwise_is_there_to_be_said(variant):
    exercise = find(variant.exercise)
    assert set(variant.titles) <= {test.__name__ for test in properties(exercise)}
    assert set(variant.sentences) <= {mutant.name for mutant in mutants_of(exercise)}
    for mutant in variants.mistakes_of(variant):
        assert mutant.says.endswith((".", "?", "!")), mutant.name
    if not variant.usual:
        text = " ".join(variants.title(test, variant) for test in properties(exercise))
        assert len(text) > 100


def test_an_edit_that_no_longer_fits_is_refused():
    stale = Variant("ppo.whiten", "stale", "whiten", "…", head=[("no such text", "x")])
    with pytest.raises(ValueError, match=r"ppo\.whiten, variant 'stale'.*stands 0 times"):
        source.blank("ppo.whiten", stale)


# --------------------------------------------------------------------------------- right and wrong


@each
def test_the_right_answer_gets_full_marks(variant):
    for seed in range(SEEDS):
        every, shown = variants.try_variant(
            find(variant.exercise), variant, variants.solution(variant), seed
        )
        assert not failed(every), f"seed {seed}"
        assert not failed(shown), f"seed {seed}"


@each
def test_a_blank_is_missing_in_all_that_counts(variant):
    outcomes = try_text(variant, source.blank(variant.exercise, variant))
    assert all(outcome.missing for outcome in outcomes)


@each
def test_the_published_answer_is_wrong_where_another_is_asked_for(variant):
    lost = failed(try_text(variant, source.solved(variant.exercise)))
    the_same = variant.usual or variant.name == "k1"  # kind="k1" is what is left out
    assert bool(lost) is not the_same


@pytest.mark.parametrize("id", VARIED)
def test_the_answer_to_one_variant_is_no_answer_to_another(id):
    for asked in variants.variants_of(id):
        for given in variants.variants_of(id):
            lost = failed(try_text(asked, source.solved(id, given)))
            assert bool(lost) is (asked is not given), (asked.name, given.name)


OTHER_KINDS = {"else k3"}
UNSEEN = {
    "k1": OTHER_KINDS
    | {"k3 on the wrong side", "k3 minus d", "k3 without -1", "k2 without the half", "k2 is |d|"}
    | {"k2 and k3 swapped", "always k1"},
    "k2": OTHER_KINDS
    | {"k3 on the wrong side", "k3 minus d", "k3 without -1", "k1 is |d|"}
    | {"sign"},  # of a square
    "k3": OTHER_KINDS | {"k2 without the half", "k2 is |d|", "k1 is |d|"},
    "shift": {"shift_mean ignored", "never shifted"},
}
"""Mutants that are right answers to a variant: their mistake lies in what it does not ask for."""
TWINS = {("k3", "k3 on the wrong side"): "sign"}
"""Two ways to the same function."""


@each
def test_every_mistake_loses_points_and_is_named(variant):
    exercise = find(variant.exercise)
    unseen = UNSEEN.get(variant.name, set())
    assert unseen <= {mutant.name for mutant in variants.mistakes_of(variant)}
    for mutant in variants.mistakes_of(variant):
        answer = variants.mistaken(variant, mutant)
        every, shown = variants.try_variant(exercise, variant, answer)
        assert bool(failed(shown)) is (mutant.name not in unseen), mutant.name
        assert failed(every) == set() or failed(shown), "it fails where it does not count"
        errors = [str(o.mismatch.got) for o in shown if o.mismatch]
        assert not [text for text in errors if text.startswith(("NameError", "ImportError"))]
        named = variants.recognise(exercise, variant, every)
        expected = None if mutant.name in unseen else mutant.name
        expected = TWINS.get((variant.name, expected), expected)
        assert (named and named.name) == expected
        assert named is None or named.says in {m.says for m in variants.mistakes_of(variant)}


def test_mistakes_of_a_variants_own_words():
    bootstrap = variants.find("mdp.gae", "bootstrap")
    says = {mutant.name: mutant.says for mutant in variants.mistakes_of(bootstrap)}
    assert "`last_values`" in says["bootstrapped from a pad"]
    assert "`last_values` is ignored" in says["last values ignored"]
    assert says["lambda missing"] == next(
        mutant.says for mutant in mutants_of(find("mdp.gae")) if mutant.name == "lambda missing"
    )


# Written by hand, in another way than the package's: loops, float32, no function of the course.

BY_HAND = {
    "left mask": """
def action_mask(prompt_lengths, response_lengths, length):
    rows = []
    for r in response_lengths.tolist():
        rows.append([False] * (length - 1 - r) + [True] * r)
    return torch.tensor(rows)
""",
    "left mean": """
def mean_reward(token_scores, prompt_lengths, response_lengths):
    rows = zip(token_scores, response_lengths.tolist())
    return torch.stack([row[len(row) - r:].mean() for row, r in rows])
""",
    "k1": """
def kl_estimate(logprobs, ref_logprobs):
    return -(ref_logprobs - logprobs)
""",
    "k2": """
def kl_estimate(logprobs, ref_logprobs):
    return 0.5 * (ref_logprobs - logprobs) ** 2
""",
    "k3": """
def kl_estimate(logprobs, ref_logprobs):
    ratio = torch.exp(ref_logprobs - logprobs)
    return ratio - 1 - torch.log(ratio)
""",
    "bootstrap": """
def gae(rewards, values, mask, last_values, gamma=1.0, lam=0.95):
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(mask)):
        value, advantage = last_values[b].item(), 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            delta = rewards[b, t].item() + gamma * value - values[b, t].item()
            advantage, value = delta + gamma * lam * advantage, values[b, t].item()
            advantages[b, t], returns[b, t] = advantage, advantage + value
    return advantages, returns
""",
    "shift": """
def whiten(x, mask, eps=1e-8, group=None):
    valid = x.detach()[mask]
    out = torch.zeros_like(valid) + (valid - valid.mean()) / (valid.var(correction=0) + eps).sqrt()
    return torch.zeros_like(x).masked_scatter(mask, out)
""",
    "no shift": """
def whiten(x, mask, eps=1e-8, group=None):
    valid = x.detach()[mask]
    m = valid.mean()
    out = torch.zeros_like(x).detach()
    out[mask] = (valid - m) / (valid.var(correction=0) + eps).sqrt() + m
    return out
""",
}
PLACES = {
    "left mask": ("mdp.action_mask", "left"),
    "left mean": ("reward_model.mean_reward", "left"),
    **{kind: ("mdp.kl_estimate", kind) for kind in ("k1", "k2", "k3")},
    "bootstrap": ("mdp.gae", "bootstrap"),
    "shift": ("ppo.whiten", "shift"),
    "no shift": ("ppo.whiten", "no shift"),
}


@pytest.mark.parametrize("which", BY_HAND)
def test_another_right_answer_gets_full_marks(which):
    for seed in range(SEEDS):
        assert not failed(try_text(variants.find(*PLACES[which]), BY_HAND[which], seed))


@pytest.mark.parametrize("name", ["no shift", "shift"])
def test_no_answer_in_half_of_the_forms(name):
    """The identity, zeros, and an answer that refuses are wrong in either."""
    variant = variants.find("ppo.whiten", name)
    for body in ("return x", "return torch.zeros_like(x)", "raise ValueError('no')", "return None"):
        assert failed(try_text(variant, f"def whiten(x, mask, eps=1e-8, group=None):\n    {body}"))


def test_an_input_that_the_form_has_made_may_not_be_changed_either():
    variant = variants.find("mdp.gae", "bootstrap")
    text = BY_HAND["bootstrap"].replace(
        "return advantages", "rewards.zero_()\n    return advantages"
    )
    outcomes = try_text(variant, text)
    assert all("changed its input rewards" in outcome.mismatch.what for outcome in outcomes)


def test_a_changed_input_is_shown_as_it_was():
    variant = variants.find("ppo.whiten", "no shift")
    body = "x.zero_()\n    return x"
    outcomes = try_text(variant, f"def whiten(x, mask, eps=1e-8, group=None):\n    {body}")
    (found,) = [o.mismatch for o in outcomes if o.title == "the mean is added back"]
    assert found.what == "it changed its input x in place"
    assert found.expected.tolist() == found.inputs["x"].tolist() == [[0.0, 4.0, 9.0]]
    assert found.got.tolist() == [[0.0, 0.0, 0.0]]


def test_an_error_is_told_with_its_cause():
    text = "def kl_estimate(logprobs, ref_logprobs):\n    return [][0]"
    outcome = try_text(variants.find("mdp.kl_estimate", "k2"), text)[0]
    assert isinstance(outcome.mismatch.__cause__, IndexError)


def test_a_trial_leaves_the_random_numbers_alone():
    variant = variants.find("ppo.whiten", "shift")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    try_text(variant, BY_HAND["shift"], seed=7)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------- what is counted


@each
def test_what_never_calls_the_answer_does_not_count(variant):
    exercise = find(variant.exercise)
    tests = properties(exercise)
    counts = variants.counted(exercise, variant)
    left_out = {title(test) for test, count in zip(tests, counts, strict=True) if not count}
    others = {"k1", "k2", "k3"} - {variant.name}
    if variant.exercise == "mdp.kl_estimate":
        one_action = {f"{kind} of one action, by hand" for kind in others}
        expected = {"another kind than these three is refused with a ValueError"} | one_action
        assert {text.partition(";")[0] for text in left_out} == expected
    else:
        assert not left_out
    assert any(test.property.core and count for test, count in zip(tests, counts, strict=True)), (
        "no property gates the others"
    )


def test_without_a_variant_all_is_as_it_was():
    exercise = find("mdp.gae")
    answer = exercise.reference()
    assert variants.adapted(exercise, None, answer) is answer
    assert variants.counted(exercise, None) == (True,) * len(properties(exercise))
    every, shown = variants.try_variant(exercise, None, answer)
    assert [o.title for o in every] == [o.title for o in shown]
    (mutant, *_) = mutants_of(exercise)
    every, _ = variants.try_variant(exercise, None, mutant.answer())
    assert variants.recognise(exercise, None, every) is mutant
    assert source.blank("mdp.gae") == source.blank("mdp.gae", variants.find("mdp.gae", "terminal"))


def test_a_subject_elsewhere_is_asked_in_the_variants_form():
    exercise, variant = find("mdp.kl_estimate"), variants.find("mdp.kl_estimate", "k2")
    told = []

    class Elsewhere(Subject):
        def begin(self, seed):
            told.append(seed)
            super().begin(seed)

    behind = Elsewhere(exercise, variants.solution(variant))
    subject = variants.VariantSubject(exercise, variant, behind)
    assert all(run(test, subject, seed=5).passed for test in properties(exercise))
    assert set(told) == {5}
    assert subject.whiten is find("ppo.whiten").reference()
    wrong = variants.VariantSubject(exercise, variant, Elsewhere(exercise, torch.sub))
    ours = [run(test, wrong) for test in properties(exercise)]
    assert alike(ours, variants.try_variant(exercise, variant, torch.sub)[0])


def test_rows_are_rolled_and_nothing_is_lost():
    x, shift = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([1, 0])
    assert rolled(x, shift).tolist() == [[3, 1, 2], [4, 5, 6]]
    assert torch.equal(rolled(rolled(x, shift), -shift), x)
    for odd in (None, "text", torch.tensor(1.0), torch.zeros(3, 3), torch.zeros(2, 0)):
        assert rolled(odd, shift) is odd


# ---------------------------------------------------------------------------------- check, printing


def test_the_check_speaks_of_the_variants_own_call(capsys):
    text = source.solved("mdp.action_mask")
    result = check(answer_from(find("mdp.action_mask"), text), variant="left")
    said = capsys.readouterr().out
    assert not result
    assert "in a row of 6: the actions are 2, 3 and 4" in said
    assert "[False, False, True, True, True]" in "".join(
        str(result.first.mismatch.expected.tolist())
    )
    assert result.first.mismatch.got.tolist() == [[False, True, True, True, False]]
    assert "Here they are padded on the left" in said


def test_the_check_shows_what_the_bootstrap_was_given(capsys):
    text = BY_HAND["bootstrap"].replace("last_values[b].item(), 0.0", "0.0, 0.0")
    result = check(answer_from(find("mdp.gae"), text), variant="bootstrap")
    found = result.first.mismatch
    assert found.inputs["last_values"].tolist() == [0.75]
    assert found.inputs["rewards"].tolist() == [[0.25]]
    assert [x.item() for x in found.expected] == pytest.approx([0.6, 1.0])
    assert [x.item() for x in found.got] == pytest.approx([-0.15, 0.25])
    assert "`last_values` is ignored" in capsys.readouterr().out


def test_the_check_shows_whitening_with_the_mean():
    result = check(identity_whiten(), variant="no shift")
    for outcome in result.outcomes:
        if outcome.title == "the mean is added back":
            assert outcome.mismatch.expected.tolist() == [[1.0, 3.0, 0.0]]
            assert outcome.mismatch.got.tolist() == [[0.0, 4.0, 9.0]]
            assert list(outcome.mismatch.inputs) == ["x", "mask"]


def identity_whiten():
    return answer_from(
        find("ppo.whiten"), "def whiten(x, mask, eps=1e-8, group=None):\n    return x"
    )


def test_an_answer_in_its_usual_form_is_checked_as_it_was_written(capsys):
    solution = variants.solution(variants.find("mdp.kl_estimate", "k3"))
    usual = variants.usual_form(solution, "k3")
    assert usual.__name__ == "kl_estimate"
    assert variants.usual_form(usual, "k3") is usual
    assert check(usual, variant="k3")
    assert check(usual), "it is an answer to the exercise as it is, too"
    capsys.readouterr()
    with pytest.raises(ConfigError, match="no variant 'left'"):
        check(solution, variant="left")


@pytest.fixture(scope="module")
def chapters():
    """(manuscript, student notebook, solution) of the chapters with variants, for seed 3."""
    made = {}
    for file in build.manuscripts(ROOT, (3, 4, 5)):
        text = manuscript.read(file)
        chosen = variants.choose(3, [exercise.id for exercise in text.exercises])
        editions = [
            notebook.build(text, e, chosen) for e in (notebook.CHAPTERS, notebook.SOLUTIONS)
        ]
        made[text.chapter] = text, *editions
    return made


def cell(made, id):
    (found,) = [c for c in made.cells if c.id == id]
    return found


def test_a_printed_variant_says_what_is_asked(chapters):
    _, student, solution = chapters[4]
    variant = variants.find("mdp.gae", "bootstrap")
    for made, written in ((student, source.blank), (solution, source.solved)):
        assert cell(made, "header-gae").source.endswith(f"\n\n**In this version:** {variant.says}")
        assert cell(made, "exercise-gae").source == written("mdp.gae", variant)
        assert cell(made, "check-gae").source == 'check(gae, variant="bootstrap")'
        assert all(hint in cell(made, "hints-gae").source for hint in variant.hints)
        given = cell(made, "given-gae").source
        assert given.endswith('\ngae = variants.usual_form(gae, "bootstrap")')
        assert max(map(len, given.splitlines())) <= 88
    # An exercise without variants is printed as ever.
    assert cell(student, "exercise-token_rewards").source == source.blank("mdp.token_rewards")
    assert cell(student, "check-token_rewards").source == "check(token_rewards)"
    assert "version" not in cell(student, "header-token_rewards").source


def test_the_imports_are_those_that_the_variants_need(chapters):
    text, student, _ = chapters[3]
    plain = notebook.build(text, notebook.CHAPTERS)
    imports = [
        next(c.source for c in made.cells if c.source.startswith("# What the exercises"))
        for made in (plain, student)
    ]
    assert ["_response_mask" in lines for lines in imports] == [True, False]


def test_students_get_no_way_to_another_printing(chapters):
    for _, student, solution in chapters.values():
        assert "colab" not in student.cells[0].source
        assert "solutions/" not in student.cells[0].source
        assert "../chapters/" in solution.cells[0].source
    assert "solutions/" not in cell(chapters[5][1], "hints-whiten").source
    assert "../solutions/" in cell(chapters[5][1], "hints-policy_loss").source


def test_a_variant_in_the_usual_form_needs_a_sentence_only():
    text = manuscript.read(build.manuscripts(ROOT, (4,))[0])
    chosen = {"mdp.gae": variants.find("mdp.gae", "terminal")}
    made = notebook.build(text, notebook.CHAPTERS, chosen)
    assert "behind its last action the value is 0." in cell(made, "header-gae").source
    assert cell(made, "check-gae").source == "check(gae)"
    assert not [c for c in made.cells if c.id == "given-gae"]
    nothing = dict.fromkeys([exercise.id for exercise in text.exercises])
    plain = notebook.write(notebook.build(text, notebook.CHAPTERS))
    assert notebook.write(notebook.build(text, notebook.CHAPTERS, nothing)) == plain


@pytest.mark.parametrize("chapter", [3, 4, 5])
def test_a_printed_solution_passes_its_own_checks(chapters, chapter, capsys):
    text, _, solution = chapters[chapter]
    ids = tuple(f"{part}-{e.qualname.replace('.', '-')}" for e in text.exercises
                for part in ("exercise", "check", "given"))  # fmt: skip
    first = next(c for c in solution.cells if c.source.startswith("# What the exercises"))
    namespace = {"__name__": "__main__", "check": check}
    exec(first.source, namespace)
    for made in solution.cells:
        if made.id in ids:
            exec(compile(made.source, made.id, "exec"), namespace)
    said = capsys.readouterr().out
    assert "✗" not in said
    assert said.count("✓") >= 4 * len(text.exercises)
    for exercise in text.exercises:  # from here on all of them have their usual form
        assert check(namespace[exercise.name])


@pytest.mark.parametrize("chapter", [3, 4, 5])
def test_the_grader_takes_what_the_student_wrote(chapters, chapter):
    """And not what the cell behind it makes of it for the rest of the chapter."""
    text, _, solution = chapters[chapter]
    code = [c.source if c.cell_type == "code" else None for c in solution.cells]
    taken = extract.statements(code)
    assert not [s for s in taken if "usual_form" in s.text]
    chosen = variants.choose(3, [exercise.id for exercise in text.exercises])
    for id, variant in chosen.items():
        if variant:
            name = id.partition(".")[2]
            definitions = [s for s in extract.needed(taken, name) if name in s.binds]
            assert not definitions[-1].imported
            assert source.solved(id, variant).startswith(definitions[-1].text)


def course(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["build", "--root", str(tmp_path), *arguments])
    return build.main()


def test_the_builder_prints_chapters_for_graded_use(tmp_path, monkeypatch, capsys):
    (tmp_path / "manuscript").mkdir()
    for file in build.manuscripts(ROOT, (4, 5)):
        (tmp_path / "manuscript" / file.name).write_bytes(file.read_bytes())
    executed = []
    monkeypatch.setattr(execute, "execute", lambda made, settings: executed.append(settings))
    out = tmp_path / "graded" / "autumn"
    arguments = ["--variants", "3", "--out", str(out)]
    assert course(tmp_path, monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "variants/05_ppo: ppo.whiten no shift\n" in said
    assert not executed
    written = sorted(file.relative_to(out).as_posix() for file in out.rglob("*.*"))
    stems = ("04_mdp", "05_ppo")
    assert written == [f"{e}/{s}.ipynb" for e in ("chapters", "solutions") for s in stems]
    text = (out / "chapters" / "04_mdp.ipynb").read_text(encoding="utf-8")
    assert "**In this version:** write the estimate k2" in text
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.ipynb")}
    assert course(tmp_path, monkeypatch, "5", "--quick", *arguments) == 0
    assert "; it runs" in capsys.readouterr().out
    assert executed == [build.QUICK]
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*.ipynb")}
    assert not (tmp_path / "chapters").exists()


def test_variants_need_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "manuscript").mkdir()
    (file,) = build.manuscripts(ROOT, (5,))
    (tmp_path / "manuscript" / file.name).write_bytes(file.read_bytes())
    for arguments in (["--variants", "3"], ["--out", str(tmp_path / "x")],
                      ["--variants", "3", "--out", str(tmp_path)]):  # fmt: skip
        assert course(tmp_path, monkeypatch, *arguments) == 2
        assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "chapters").exists()
