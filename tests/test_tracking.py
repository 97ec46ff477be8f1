"""Trackers: what TensorBoard and Weights & Biases have got is read back from their files."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_runs
from test_runs import CONFIG, EVERY, TOTAL, Boom, at, boom, update

from rlhf_course import cli, tracking
from rlhf_course.errors import ConfigError
from rlhf_course.runs import Run, read_metrics, read_timing
from rlhf_course.stages.settings import DemoConfig, SFTConfig

wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No account, no settings of this machine, and no network."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()  # the settings of the environment are read once


def train(out, track, after_log=test_runs.nothing, before_log=test_runs.nothing):
    state = test_runs.toy_state()
    with Run(out, CONFIG, TOTAL, "toy", checkpoint_every=EVERY, track=track) as run:
        for step in run.steps(state):
            metrics = update(state, step)
            before_log(step)
            run.log(step, metrics, {"seconds": step / 7})
            after_log(step)
        run.finish()
    return out


def records(file: Path):
    """The records of a .wandb file: LevelDB's log format (header, then blocks of 32 KiB that hold
    pieces with a checksum, a length and a kind), each a protocol buffer that wandb ships."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # in one piece, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def files(out: Path) -> list[Path]:
    """The .wandb files, once they are whole: wandb's service writes on when `finish` is back."""
    found = sorted((out / "wandb").glob("*-run-*/*.wandb"))
    for file in found:
        test_runs.until(lambda file=file: "exit" in {r.WhichOneof("record_type")
                                                     for r in records(file)})  # fmt: skip
    return found


def sent(file: Path) -> list[dict]:
    """The history of a .wandb file: metrics by name, and "step"."""
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json)
                     for i in record.history.item}  # fmt: skip
            row = {name: value for name, value in items.items() if not name.startswith("_")}
            rows.append({"step": items["_step"], **row})
    return rows


def recorded(out: Path) -> list[dict]:
    """What the run folder has."""
    return [{**a, **b} for a, b in zip(read_metrics(out), read_timing(out), strict=True)]


def started(file: Path):
    return next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")


def test_offline_the_run_folder_holds_every_step_and_value(tmp_path):
    out = train(tmp_path / "town" / "sft", "wandb")
    (file,) = files(out)
    assert sent(file) == recorded(out)
    assert len(sent(file)) == TOTAL
    run = started(file)
    assert run.project == "rlhf-course"
    assert run.display_name == "town/sft"
    assert run.run_group == "town"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == json.loads(json.dumps(CONFIG))
    assert not (out / "tensorboard").exists()
    assert not (Path.cwd() / "wandb").exists()


def test_a_run_that_failed_goes_on_in_the_same_curves_without_a_step_twice(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, "wandb", after_log=at(7, boom))
    (before,) = files(out)
    identity = started(before).run_id
    assert [row["step"] for row in sent(before)] == list(range(8))
    train(out, "wandb")
    (after,) = files(out)  # the first went to step 7, the checkpoint to 6: it would say 6, 7 twice
    assert started(after).run_id == identity
    assert not before.exists()
    assert sent(after) == recorded(out)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_nothing_is_lost_when_a_process_is_killed(tmp_path):
    out = tmp_path / "run"
    paths = [str(Path(__file__).parent), *sys.path]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import os, signal, pathlib, torch; torch.set_num_threads(1)\n"
        "import test_tracking as t\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.train(pathlib.Path(sys.argv[1]), 'wandb', after_log=t.at(8, die))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    identity = json.loads((out / "wandb" / "rlhf-course.json").read_text())["id"]
    train(out, "wandb")
    (file,) = files(out)
    assert started(file).run_id == identity
    assert sent(file) == recorded(out)


def test_steps_that_were_sent_to_the_server_are_not_sent_again(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, "wandb", after_log=at(7, boom))
    (before,) = files(out)
    before.with_name(before.name + ".synced").touch()  # `wandb sync` leaves this
    train(out, "wandb")
    first, second = sorted(files(out), key=lambda file: file != before)
    assert [row["step"] for row in sent(first)] == list(range(8))
    assert [row["step"] for row in sent(second)] == list(range(8, TOTAL))
    assert sent(second) == recorded(out)[8:]


def test_the_server_says_where_to_go_on(tmp_path, monkeypatch):
    """Online: it has the steps to 9, though the checkpoint is at 6; a killed run's were 0 to 4."""
    for has in (10, 5):
        out, got = tmp_path / f"run-{has}", []

        class Online:
            offline, dir, starting_step = False, str(out / "wandb" / "run-1-x" / "files"), has

            def log(self, values, step, commit, got=got):
                got.append({"step": step, **values})

            def finish(self):
                pass

        with pytest.raises(Boom):
            train(out, "none", after_log=at(7, boom))
        monkeypatch.setattr(wandb, "init", lambda Online=Online, **settings: Online())
        train(out, "wandb")
        assert got == recorded(out)[has:]


def test_a_run_that_is_tracked_later_shows_its_past_too(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, "tensorboard", after_log=at(7, boom))
    next_second()
    train(out, "both")
    (file,) = files(out)
    assert sent(file) == recorded(out)
    assert len(scalars(out)["loss"]) == TOTAL


def test_overwriting_a_run_begins_another(tmp_path):
    first, second = train(tmp_path / "run", "wandb"), tmp_path / "run"
    identity = started(files(first)[0]).run_id
    with Run(second, CONFIG, 1, "toy", overwrite=True, track="wandb") as run:
        for step in run.steps(test_runs.toy_state()):
            run.log(step, {"loss": 1.0})
    (file,) = files(second)
    assert started(file).run_id != identity
    assert sent(file) == [{"step": 0, "loss": 1.0}]


def next_second() -> None:
    """TensorBoard puts files in order by the second in their names; processes lie further apart."""
    now = int(time.time())
    test_runs.until(lambda: int(time.time()) > now)


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip


def test_tensorboard_shows_every_step_once_after_a_failure(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, "tensorboard", after_log=at(7, boom))
    next_second()
    train(out, "tensorboard")
    seen = scalars(out)
    assert set(seen) == {"loss", "kl_coef", "std", "seconds"}
    for row in recorded(out):
        for name, values in seen.items():
            assert values[row["step"]] == (row["step"], pytest.approx(row[name], rel=1e-6))
    assert not (out / "wandb").exists()


def test_none_writes_neither(tmp_path):
    out = train(tmp_path / "run", "none")
    assert not (out / "tensorboard").exists() and not (out / "wandb").exists()
    assert len(read_metrics(out)) == TOTAL


def test_training_goes_on_when_the_service_dies(tmp_path, capsys, monkeypatch):
    def dead(self, *rest, **named):
        raise BrokenPipeError("the service is gone")

    def die():
        monkeypatch.setattr(wandb.Run, "log", dead)

    out = train(tmp_path / "run", "wandb", before_log=at(4, die))
    assert "takes no more (BrokenPipeError: the service is gone)" in capsys.readouterr().out
    assert len(read_metrics(out)) == TOTAL


# --- what is refused, before anything is trained ----------------------------------------------


def tracked_sft(tmp_path, *more) -> int:
    return cli.main(["sft", "--size", "tiny", "--out", str(tmp_path / "sft"), *more])


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert tracked_sft(tmp_path, "--track", "wandb") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "wandb is not installed" in said and "pip install wandb" in said
    assert not (tmp_path / "sft").exists()


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    code = "from rlhf_course.tracking import require_tracker as r; r('both')"
    place = str(Path(tracking.__file__).parents[1])
    # -S: none of the site's packages, so that the folder is what is found; tyro is not needed here.
    blocked = (
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "def only(name, path=None, target=None):\n"
        f"    if name == 'wandb': path = [{str(tmp_path)!r}]\n"
        "    return find(name, path, target)\n"
        "m.PathFinder.find_spec = only\n"
    )
    done = subprocess.run([sys.executable, "-c", blocked + code], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": place})  # fmt: skip
    assert "ConfigError: --track both: the package wandb is not installed" in done.stderr


def test_without_an_account_it_says_what_to_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    assert tracked_sft(tmp_path, "--track", "wandb") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no account is logged in" in said
    assert "wandb login" in said and "WANDB_API_KEY" in said and "WANDB_MODE=offline" in said
    assert not (tmp_path / "sft").exists()


def test_a_wrong_setting_of_the_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigError, match=r"--track wandb: .*mode"):
        Run(tmp_path / "run", CONFIG, TOTAL, "toy", track="wandb")


def test_a_server_that_cannot_be_reached_leaves_no_run(tmp_path, monkeypatch):
    def unreachable(**settings):
        raise wandb.Error("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    with pytest.raises(ConfigError, match=r"no route to host.*WANDB_MODE=offline"):
        train(tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_needs_no_account(tmp_path, monkeypatch):
    train(tmp_path / "run", "none")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert Run(tmp_path / "run", CONFIG, TOTAL, "toy", track="wandb").finished


# --- the flag ---------------------------------------------------------------------------------


def test_where_the_curves_go_is_no_part_of_what_the_run_is(tmp_path):
    from rlhf_course.stages.demo import stages_of
    from rlhf_course.stages.presets import identity

    one, other = SFTConfig(track="both"), SFTConfig()
    assert identity(one) == identity(other)
    assert "track" not in identity(one)
    stages = stages_of(DemoConfig(track="wandb"), tmp_path)
    assert {config.track for _, config in stages.values()} == {"wandb"}


def test_a_stage_without_curves_refuses_the_flag(capsys):
    assert cli.main(["evaluate", "--track", "wandb"]) == 2
    assert "--track wandb: `evaluate` draws no curve" in capsys.readouterr().err


def test_a_stage_tracks_what_it_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--size", "tiny", "--threads", "1", "--steps", "3", "--batch", "4", "--window", "32"]
    assert cli.main(["pretrain", *words, "--track", "both", "--out", "runs/pretrain"]) == 0
    out = tmp_path / "runs" / "pretrain"
    (file,) = files(out)
    assert sent(file) == recorded(out)
    assert {"loss", "lr", "validation_perplexity", "tokens_per_second"} <= set(sent(file)[-1])
    config = {item.key: json.loads(item.value_json) for item in started(file).config.update}
    assert {k: v for k, v in config.items() if k != "_wandb"} == json.loads(
        (out / "config.json").read_text()
    )
    assert scalars(out).keys() == {name for row in recorded(out) for name in row} - {"step"}
