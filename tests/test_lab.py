"""The notebooks' laboratory: base models made once, students' functions in the trainer, runs side
by side. Everything in quick mode."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_course import files, gpt, lab, mdp, ppo, ppo_ptx, reward_model, stages
from rlhf_course.coursework import jobs, workers
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.coursework.substitute import substituted
from rlhf_course.distributed.settings import NOT_IDENTITY
from rlhf_course.errors import CheckpointError, ConfigError, TrainingError
from rlhf_course.stages import presets


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A shared cache of these tests' own, in quick mode."""
    folder = tmp_path_factory.mktemp("home")
    before = dict(os.environ)
    os.environ |= {"RLHF_COURSE_HOME": str(folder), "RLHF_COURSE_QUICK": "1"}
    yield folder
    os.environ.clear()
    os.environ |= before


def traced(function, calls: list):
    """The same function, leaving a trace."""

    def wrapped(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    wrapped.__name__ = function.__name__
    return wrapped


def test_a_base_model_is_made_once_with_all_before_it(home, capsys):
    model, tokenizer = lab.model("sft")
    place = lab.folder("sft")
    assert place.is_relative_to(home)
    assert {p.name for p in place.parent.iterdir() if not p.name.startswith(".")} == {
        "pretrain", "sft",
    }  # fmt: skip
    changed = (place / "done.json").stat().st_mtime_ns
    again, _ = lab.model("sft")
    assert (place / "done.json").stat().st_mtime_ns == changed
    assert again is not model, "a chapter may change what it was given"
    (text, finished), _ = lab.answers(model, tokenizer, lab.world().prompts("ppo", 2, 0))
    assert isinstance(text, str)
    assert isinstance(finished, bool)


def test_quick_mode_and_the_real_one_do_not_share_models(home, monkeypatch):
    quick = lab.workspace("town")
    assert lab.quick
    monkeypatch.setenv("RLHF_COURSE_QUICK", "0")
    assert not lab.quick
    assert lab.workspace("town") != quick


def test_the_students_functions_train(home):
    calls = []
    own = [traced(f, calls) for f in (mdp.gae, mdp.token_rewards, ppo.policy_loss, ppo.whiten)]
    result = lab.train("ppo", name="traced", own=own)
    assert {f.__name__ for f in own} == set(calls)
    assert len(result.curve("kl")) == len(result.metrics) >= 2
    assert result.seconds > 0
    assert ppo.policy_loss is not own[2], "afterwards all is as before"
    calls.clear()
    lab.train("ppo", name="traced", own=own)
    assert calls, "with own functions it always runs"


def test_a_function_that_changes_the_result_does_so(home):
    rewards = mdp.token_rewards  # the module's own name will be the substitute's

    def token_rewards(scores, kl, mask, kl_coef, score_clip=None):
        return rewards(-scores, kl, mask, kl_coef, score_clip)

    plain = lab.train("ppo", name="plain")
    other = lab.train("ppo", name="negated", own=[token_rewards])
    assert plain.curve("score")[0] == other.curve("score")[0]
    assert plain.curve("value_loss") != other.curve("value_loss")


def test_a_run_on_a_cluster_takes_the_laptops_settings(home):
    folder = lab.workspace() / "on a cluster"
    there = jobs.configuration("ppo_ray", folder, "town", {"actor_ranks": 3})
    here = jobs.configuration("ppo", folder, "town", {})
    there.checkpoint_every = here.checkpoint_every
    assert {name: getattr(there, name) for name in vars(here)} == vars(here)
    assert there.critic_ranks == 3
    with pytest.raises(ConfigError, match="ppo has no setting 'actor_ranks'"):
        jobs.configuration("ppo", folder, "town", {"actor_ranks": 3})
    with pytest.raises(ConfigError, match="all chapters share"):
        lab.train("ppo_ray", name="ppo_ray")


def test_where_a_run_on_a_cluster_ran_is_not_what_it_is(home):
    folder = lab.workspace() / "ran on a cluster"
    held = presets.identity(jobs.configuration("ppo_ray", folder, "town", {"engines": 2}))
    files.write_json(
        folder / "config.json", {k: v for k, v in held.items() if k not in NOT_IDENTITY}
    )
    files.write_json(folder / "done.json", {})
    for settings, same in (({}, True), ({"actor_ranks": 5}, True), ({"staleness": 1}, False)):
        assert jobs.is_done("ppo_ray", folder, "town", settings) == same


def test_what_is_not_written_is_said_kindly(home):
    def gae(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(ConfigError, match="not written yet"):
        lab.train("ppo", own=[gae])


def test_wrong_names_are_refused(home):
    with pytest.raises(ConfigError, match="no setting 'learning_rate'"):
        lab.train("ppo", learning_rate=1.0)
    with pytest.raises(ConfigError, match="stage 'ppp'"):
        lab.train("ppp")
    with pytest.raises(ConfigError, match="'helper' is not an exercise"):
        lab.train("ppo", own=[traced_as("helper")])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"own": [functools.partial(ppo.whiten)]}, "own takes functions"),
        ({"own": ["whiten"]}, "own takes functions"),
        ({"own": ppo.whiten}, "own is a list"),
        ({"world": "moon"}, "no world 'moon'"),
        ({"iterations": "ten"}, "wrong kind"),
        ({"iterations": 0}, "at least 1"),
        ({"out": "elsewhere"}, "no setting 'out'"),
        ({"size": "huge"}, "no setting 'size'"),
        ({"name": "sft"}, "all chapters share"),
        ({"name": "../x"}, "choose another one"),
        ({"name": "x/../ppo"}, "all chapters share"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(home, settings, says):
    there = sorted(home.rglob("config.json"))
    with pytest.raises(ConfigError, match=says):
        lab.train("ppo", **settings)
    assert sorted(home.rglob("config.json")) == there
    if "own" not in settings:
        settings = {k: v for k, v in settings.items() if k != "name"} | {"stage": "ppo"}
        with pytest.raises(ConfigError):
            lab.train_many({"name": {**settings, "iterations": 0}})


def test_many_runs_need_a_worker_and_folders_of_their_own(home):
    with pytest.raises(ConfigError, match="workers -1"):
        lab.train_many({"few": {}}, workers=-1)
    with pytest.raises(ConfigError, match="all chapters share"):
        lab.train_many({"sft": {}})


def test_a_home_may_stand_below_the_users(monkeypatch):
    monkeypatch.setenv("RLHF_COURSE_HOME", "~/course")
    assert lab.home() == Path.home() / "course"


def test_what_torch_cannot_do_is_not_called_unwritten(home):
    def whiten(*args, **kwargs):
        return torch.nn.functional.logsigmoid(torch.tensor([1]))

    with pytest.raises(NotImplementedError, match="'Long'"):
        lab.train("ppo", own=[whiten])


def test_answers_to_nothing_and_of_no_length(home):
    model, tokenizer = lab.model("sft")
    assert lab.answers(model, tokenizer, []) == []
    with pytest.raises(ConfigError, match="a list"):
        lab.answers(model, tokenizer, "Who is Ada?")


def test_two_notebooks_train_a_base_model_once(home, tmp_path):
    code = "from rlhf_course import lab; print(lab.folder('pretrain'))"
    package = str(Path(lab.__file__).parents[2])
    environment = {**os.environ, "RLHF_COURSE_HOME": str(tmp_path), "PYTHONPATH": package}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("15/15" in out for out, _ in said) == 1, said
    metrics = lab.Trained(Path(said[0][0].splitlines()[-1])).metrics
    assert [row["step"] for row in metrics] == sorted({row["step"] for row in metrics})


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be interrupted there")
def test_an_interrupt_ends_the_runs_and_leaves_checkpoints(home, tmp_path, monkeypatch):
    long = {"model": "tiny", "steps": 100_000, "batch": 2, "checkpoint_every": 100_000}
    monkeypatch.setenv("RLHF_COURSE_QUICK", "0")
    monkeypatch.setenv("RLHF_COURSE_HOME", str(tmp_path))
    begun = []

    class Watched(workers.Worker):
        def check(self):
            begun.append(self)
            super().check()
            if self.share > 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(workers, "Worker", Watched)
    with pytest.raises(KeyboardInterrupt):
        lab.train_many({"a": {"stage": "pretrain", **long}, "b": {"stage": "pretrain", **long}},
                       workers=2)  # fmt: skip
    assert all(worker.process.poll() is not None for worker in begun)
    assert any((lab.workspace() / name / "checkpoints").exists() for name in "ab")


def traced_as(name):
    def function():
        """Nothing."""

    function.__name__ = name
    return function


def test_a_run_is_repeated_only_with_other_settings(home):
    first = lab.train("ppo", name="again", ptx_coef=0.0)
    stamp = (first.folder / "done.json").stat().st_mtime_ns
    lab.train("ppo", name="again", ptx_coef=0.0)
    assert (first.folder / "done.json").stat().st_mtime_ns == stamp
    lab.train("ppo", name="again", ptx_coef=0.5)
    assert (first.folder / "done.json").stat().st_mtime_ns > stamp


def test_a_run_with_own_functions_is_not_taken_for_the_packages(home):
    lab.train("ppo", name="mixed", own=[traced(mdp.gae, [])])
    stamp = (lab.workspace() / "mixed" / "done.json").stat().st_mtime_ns
    plain = lab.train("ppo", name="mixed")
    later = (plain.folder / "done.json").stat().st_mtime_ns
    assert later > stamp, "it is run once more, with the package's"
    lab.train("ppo", name="mixed")
    assert (plain.folder / "done.json").stat().st_mtime_ns == later


def test_a_home_that_cannot_be_written_to_is_said(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RLHF_COURSE_QUICK", "1")
    monkeypatch.setenv("RLHF_COURSE_HOME", str(file))
    with pytest.raises(CheckpointError, match="Set RLHF_COURSE_HOME"):
        lab.model("sft")
    with pytest.raises(TrainingError, match="Set RLHF_COURSE_HOME"):
        lab.train_many({"a": {"stage": "pretrain"}}, workers=1)


def test_runs_side_by_side_are_those_of_one_process(home):
    runs = {f"many{seed}": {"stage": "ppo", "seed": seed} for seed in (0, 1)}
    many = lab.train_many(runs, workers=2)
    alone = lab.train("ppo", name="alone", seed=1)
    assert many["many1"].metrics == alone.metrics
    assert many["many0"].metrics != alone.metrics
    stamps = [(r.folder / "done.json").stat().st_mtime_ns for r in many.values()]
    lab.train_many(runs)
    assert stamps == [(r.folder / "done.json").stat().st_mtime_ns for r in many.values()]


def test_a_run_that_fails_says_why_and_ends_the_others(home):
    with pytest.raises(TrainingError, match=r"nonsense.*is not there|nonsense"):
        lab.train_many(
            {"bad": {"stage": "ppo", "model": str(home / "nonsense")}, "good": {}}, workers=2
        )


def test_a_worker_that_dies_is_noticed(tmp_path):
    with pytest.raises(TrainingError, match="the run x failed"):
        workers.run_all([("no such stage", Path(tmp_path / "x"), "town", {})])


# ------------------------------------------------------------------------------------ substitution


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_every_exercise_can_be_substituted_and_comes_back(exercise):
    original = exercise.reference()
    mine = type(exercise.name, (original,), {}) if exercise.method else traced(original, [])
    module = __import__(f"rlhf_course.{exercise.module}", fromlist=["x"])
    with substituted([mine]):
        assert getattr(module, exercise.name) is mine
    assert getattr(module, exercise.name) is original


def test_substitution_reaches_every_module_that_imported_the_name():

    mine = traced(ppo.whiten, [])
    with substituted([mine]):
        assert stages.rollouts.whiten is mine
        assert ppo.whiten is mine
    assert stages.rollouts.whiten is ppo.whiten


def test_a_substituted_block_is_what_a_new_gpt_is_made_of():
    class Block(gpt.Block):
        pass

    Block.__name__ = "Block"
    config = gpt.GPTConfig(vocab_size=11, layers=2, heads=2, width=16)
    with substituted([Block]):
        assert all(type(block) is Block for block in gpt.GPT(config).blocks)
    assert not any(type(block) is Block for block in gpt.GPT(config).blocks)


def test_an_error_inside_restores_everything():
    mine = traced(reward_model.kwise_loss, [])
    with pytest.raises(KeyError), substituted([mine]):
        raise KeyError
    assert reward_model.kwise_loss is not mine
    assert ppo_ptx.ptx_loss.__module__ == "rlhf_course.ppo_ptx"
