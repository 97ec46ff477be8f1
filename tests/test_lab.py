"""The notebooks' laboratory: base models made once, students' functions in the trainer, runs side
by side. Everything in quick mode."""

import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_course import files, gpt, lab, mdp, ppo, ppo_ptx, reward_model, stages
from rlhf_course.coursework import jobs, recipes, workers
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.coursework.own import fingerprint
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


# ---------------------------------------------------------------- sessions that end in the middle

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no fork")


def live(environment: dict[str, str], name: str, own: bool, factor: float, die: int) -> None:
    """What a session does: it trains, and is killed before its rollout number `die`. Its exit code
    is the number of rollouts that it has made."""
    os.environ |= environment
    recipes.QUICK["iterations"], made, collect = 6, 0, stages.ppo.collect
    original = mdp.gae

    def gae(*args, **kwargs):
        advantages, returns = original(*args, **kwargs)
        return factor * advantages, returns

    def counted(*args, **kwargs):
        nonlocal made
        made += 1
        if made == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(*args, **kwargs)

    torch.set_num_threads(1)
    stages.ppo.collect = counted
    lab.train("ppo", name=name, own=[gae] * own, iterations=6, checkpoint_every=1)
    sys.exit(made)


@pytest.fixture(scope="module")
def session(home):
    """session(name, own, factor, die): the number of rollouts, or -9 where it was killed."""
    lab.ensure("reward_model")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "rlhf_course.stages.ppo", "torch.utils.tensorboard"])
    environment = {name: os.environ[name] for name in ("RLHF_COURSE_HOME", "RLHF_COURSE_QUICK")}

    def lived(name: str, own: bool, factor: float, die: int = 0) -> int:
        process = context.Process(target=live, args=(environment, name, own, factor, die))
        process.start()
        process.join(timeout=120)
        return process.exitcode

    return lived


@needs_fork
def test_a_killed_session_goes_on_from_its_last_checkpoint_with_the_same_functions(session):
    for own in (False, True):
        assert session(f"cut {own}", own, 1.5, die=5) == -signal.SIGKILL
        assert not (lab.workspace() / f"cut {own}" / "done.json").exists()
        assert session(f"cut {own}", own, 1.5) == 3, "four of seven were there"
    assert session("whole", True, 1.5) == 7
    names = ("cut False", "cut True", "whole")
    plain, cut, whole = (lab.Trained(lab.workspace() / name).metrics for name in names)
    assert cut == whole
    assert len(cut) == 7
    assert cut != plain, "the student's function was in use"


@needs_fork
def test_a_killed_session_is_not_gone_on_with_by_other_functions(session):
    assert session("changed", True, 1.5, die=5) == -signal.SIGKILL
    assert session("changed", True, 2.0, die=3) == -signal.SIGKILL, "begun anew: another factor"
    assert session("changed", True, 2.0) == 5
    assert session("changed", True, 2.0, die=4) == -signal.SIGKILL, "what is finished begins anew"
    assert session("changed", False, 2.0) == 7, "and the package's do not go on with it"


def notebook(text: str) -> dict:
    """The names of a notebook with this cell."""
    names = {"__name__": "a notebook"}
    exec(text, names)
    return names


WRITTEN = """
import torch
SCALE = (2.0, "mean")
def helper(x): return x * SCALE[0]
def gae(x, y=1, *, z=None):
    '''What it does.'''
    return [helper(v) for v in x if v in {1, 2, "three"}], torch.sum(x)
class Controller(dict):
    rate = 0.5
    @staticmethod
    def clip(x): return max(x, 0)
    def update(self, kl): return self.clip(helper(kl)) * self.rate
"""


@pytest.mark.parametrize("name", ["gae", "Controller"])
def test_functions_are_told_apart_by_all_that_their_notebook_says(name):
    first = fingerprint([notebook(WRITTEN)[name]])
    assert first == fingerprint([notebook(WRITTEN)[name]]) != ""
    assert first == fingerprint([notebook(f"# moved\n\n{WRITTEN}\nx = 3")[name]])
    common = [("SCALE = (2.0", "SCALE = (2.5"), ("x * SCALE[0]", "x + SCALE[0]")]
    mine = {
        "gae": [("y=1", "y=2"), ("z=None", "z=0"), ('"three"', '"four"'),
                ("torch.sum", "torch.max"), ("v in {", "v not in {")],
        "Controller": [("rate = 0.5", "rate = 0.6"), ("max(x, 0)", "max(x, 1)"),
                       ("(dict)", "(list)"), ("* self.rate", "/ self.rate"),
                       ("@staticmethod", "@classmethod")],
    }  # fmt: skip
    for old, new in [*common, *mine[name]]:
        assert WRITTEN.count(old) == 1
        assert fingerprint([notebook(WRITTEN.replace(old, new))[name]]) != first, (old, new)
    assert fingerprint([]) == ""


def test_a_function_over_what_no_text_tells_is_another_each_time():
    names = notebook("seen = []\ndef gae(x):\n    seen.append(x)")
    assert fingerprint([names["gae"]]) != fingerprint([names["gae"]])
    closed = traced(mdp.gae, [])
    assert fingerprint([closed]) != fingerprint([closed])


def test_a_function_is_told_the_same_by_another_process():
    text = WRITTEN.replace("import torch", "import math as torch")
    code = f"from rlhf_course.coursework.own import fingerprint\n{text}\nprint(fingerprint([gae]))"
    package = str(Path(lab.__file__).parents[2])
    told = []
    for seed in ("1", "2", "3"):  # in which sets of strings have another order
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": package}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.append(done.stdout)
    assert len(set(told)) == 1


# --------------------------------------------------------------------------- folders without locks


@pytest.fixture
def without_locks(monkeypatch):
    """without_locks(code): every lock of a file raises this OSError, as on some network folders."""
    fcntl = pytest.importorskip("fcntl")

    def make(code):
        def flock(handle, how):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    return make


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_folder_without_locks_is_trained_in_and_that_is_said(home, without_locks, capsys, code):
    without_locks(code)
    name = f"no locks {code}"
    lab.train("pretrain", name=name, steps=2)
    assert "files cannot be locked" in " ".join(capsys.readouterr().out.split())
    lock = lab.workspace() / f".{name}.lock"
    lab.train("pretrain", name=name, steps=3)  # nobody waits for what the first one has left behind
    assert (lab.workspace() / name / "done.json").exists()
    assert lock.exists()


def test_another_failure_of_a_lock_is_told(home, without_locks):
    without_locks(errno.EIO)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        lab.train("pretrain", name="broken", steps=2)
