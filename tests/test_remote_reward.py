"""The reward behind a URL: real servers that answer well, late, wrongly, or not at all."""

import contextlib
import datetime
import importlib.util
import itertools
import json
import math
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf_course import cli
from rlhf_course.errors import ConfigError, TrainingError
from rlhf_course.runs import read_metrics
from rlhf_course.stages import remote_reward
from rlhf_course.stages.remote_reward import RemoteReward
from rlhf_course.stages.rewards import call_reward_function, load_reward_function

SERVER = Path(__file__).parents[1] / "examples" / "reward_server.py"


@contextmanager
def serving(answer):
    """A server; answer(asked, number) gives what it says to the number-th request: a list of scores
    or (status, bytes). Yields the URL and the requests so far, each with when it came and went."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append({"asked": asked, "path": self.path, "began": time.monotonic()})
            given = answer(asked, number)
            seen[number]["ended"] = time.monotonic()
            status, data = given if isinstance(given, tuple) else (200, scores(given))
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has gone
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scores(values) -> bytes:
    return json.dumps({"scores": values}).encode()


def length(asked) -> list[int]:
    return [len(response) for response in asked["responses"]]


def batch(size: int) -> tuple[list[str], list[str], list[dict]]:
    return [f"prompt {i}" for i in range(size)], ["x" * i for i in range(size)], [{}] * size


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote_reward, "BACKOFF", 0.01)


def fails(answer, size: int = 3, **settings) -> tuple[str, list]:
    """The error that such a server leads to, and the requests that it got."""
    with serving(answer) as (url, seen), pytest.raises(TrainingError) as error:
        call_reward_function(load_reward_function(url, **settings), *batch(size))
    assert url in str(error.value)
    assert "start the same command again" in str(error.value)
    return str(error.value), seen


# --- servers that answer -------------------------------------------------------------------------


def test_many_answers_go_in_chunks_side_by_side_and_come_back_in_order():
    def slow_first(asked, number):
        time.sleep(0.3 if "prompt 0" in asked["prompts"] else 0.1)
        return length(asked)

    with serving(slow_first) as (url, seen):
        out = call_reward_function(load_reward_function(url), *batch(150))
    assert out.tolist() == list(range(150))
    assert sorted(len(request["asked"]["prompts"]) for request in seen) == [22, 32, 32, 32, 32]
    assert {request["path"] for request in seen} == {"/score"}
    together = [sum(r["began"] <= s["began"] < r["ended"] for r in seen) for s in seen]
    assert 2 <= max(together) <= remote_reward.IN_FLIGHT


def test_nothing_asked_nothing_sent():
    with serving(lambda *_: []) as (url, seen):
        assert RemoteReward(url)([], [], []) == []
    assert not seen


def test_prompts_answers_and_columns_arrive_as_json():
    turns = [{"role": "user", "content": "Grüße, \ud800"}]
    row = {"n": 1, "missing": math.nan, "when": datetime.date(2024, 5, 1), "in": {"list": (1, 2.5)}}
    with serving(lambda asked, _: length(asked)) as (url, seen):
        assert RemoteReward(url)([turns], ["hé"], [row]) == [2.0]
    assert seen[0]["asked"] == {
        "prompts": [turns], "responses": ["hé"],
        "rows": [{"n": 1, "missing": None, "when": "2024-05-01", "in": {"list": [1, 2.5]}}],
    }  # fmt: skip


def test_a_proxy_of_the_environment_is_not_asked_for_a_local_server(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(lambda asked, _: length(asked)) as (url, _):
        assert RemoteReward(url, retries=0)(*batch(2)) == [0.0, 1.0]


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param((500, b"no memory"), id="500"),
        pytest.param((503, b""), id="503"),
        pytest.param((200, b"<html>"), id="rubbish"),
        pytest.param([1.0], id="too few"),
    ],
)
def test_what_passes_is_waited_for(trouble):
    def twice(asked, number):
        return trouble if number < 2 else length(asked)

    with serving(twice) as (url, seen):
        assert RemoteReward(url)(*batch(3)) == [0.0, 1.0, 2.0]
    assert len(seen) == 3
    gaps = [b["began"] - a["began"] for a, b in itertools.pairwise(seen)]
    assert gaps[0] >= 0.01
    assert gaps[1] >= 0.02, "each wait is twice the one before"


def test_a_slow_answer_is_asked_for_again():
    def late(asked, number):
        time.sleep(1.0 if number == 0 else 0)
        return length(asked)

    with serving(late) as (url, seen):
        assert RemoteReward(url, timeout=0.3)(*batch(2)) == [0.0, 1.0]
    assert len(seen) == 2


# --- servers that do not -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((200, b"<html>hello"), "'<html>hello' instead of {'scores': [1 finite numbers]}"),
        ((200, b"[1, 2, 3]"), "'[1, 2, 3]' instead of"),
        ((200, b'{"score": 1}'), "instead of"),
        ((200, b'{"scores": 1}'), "instead of"),
        ((200, b'{"scores": null}'), "instead of"),
        ((200, b'{"scores": {"a": 1}}'), "instead of"),
        ((200, b'{"scores": [[1.0]]}'), "'{\"scores\": [[1.0]]}' instead of"),
        ((200, b'{"scores": ["1.0"]}'), "instead of"),
        ((200, b'{"scores": [null]}'), "instead of"),
        ((200, b'{"scores": [NaN]}'), "'{\"scores\": [NaN]}' instead of"),
        ((200, b'{"scores": [1e999]}'), "instead of"),
        ((200, b'{"scores": [1' + b"0" * 400 + b"]}"), "instead of"),
        ((200, b'{"scores": []}'), "'{\"scores\": []}' instead of"),
        ((200, b'{"scores": [1, 2]}'), "instead of"),
        ((200, b'{"scores": ' + b"[" * 100_000), "instead of"),
        ((200, b""), "'' instead of"),
        ((200, b"\xff\xfe"), "instead of"),
        ((200, b" " * 2_000_000), "it went on beyond 1000000 bytes"),
        ((500, b"no memory"), "What came back: status 500 and 'no memory'."),
        ((204, b""), "status 204"),
        ((302, b""), "status 302"),
    ],
)
def test_rubbish_is_told_with_the_first_answer_that_brought_it(given, told):
    message, _ = fails(lambda *_: given, retries=1)
    assert told in message
    assert "no score for the answer '' to 'prompt 0'" in message
    assert "--reward-timeout" in message


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_not_repeated(status):
    message, seen = fails(lambda *_: (status, b"wrong field"))
    assert f"status {status} and 'wrong field'" in message
    assert [len(r["asked"]["rows"]) for r in seen] == [3, 1]


def test_the_answer_that_a_server_cannot_bear_is_named():
    def picky(asked, number):
        if "x" * 37 in asked["responses"]:
            return 500, b"KeyError: 'x'"
        return length(asked)

    message, seen = fails(picky, size=70, retries=2)
    assert f"no score for the answer '{'x' * 37}' to 'prompt 37'" in message
    assert "KeyError: 'x'" in message
    assert "prompt 36" not in message
    alone = [r["asked"]["prompts"] for r in seen if len(r["asked"]["prompts"]) == 1]
    assert alone == [[f"prompt {i}"] for i in (32, 33, 34, 35, 36, 37, 37, 37)]


def test_a_server_that_takes_single_answers_only_serves_too():
    """So does one that fails for a whole request at a time, by chance."""

    def one_by_one(asked, number):
        return length(asked) if len(asked["prompts"]) == 1 else (413, b"too large")

    with serving(one_by_one) as (url, _):
        assert RemoteReward(url)(*batch(40)) == list(range(40))


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    began = time.monotonic()
    with pytest.raises(TrainingError) as error:
        call_reward_function(load_reward_function(url), *batch(300))
    assert time.monotonic() - began < 5
    assert "Mend or start the server" in str(error.value)
    assert "to 'prompt 0'. What came back: ConnectError: " in str(error.value)


def test_a_server_that_hangs_is_given_up():
    release = threading.Event()
    try:
        began = time.monotonic()
        message, seen = fails(lambda *_: release.wait(20) or [], timeout=0.2, retries=1)
        assert "no answer within 0.2 seconds" in message
        assert len(seen) == 4
        assert time.monotonic() - began < 5
    finally:
        release.set()


@contextmanager
def listening(serve):
    """serve(line) for every connection, one after the other; yields the URL."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                line, _ = server.accept()
            except OSError:  # closed
                return
            with line, contextlib.suppress(OSError):
                line.recv(100_000)
                serve(line)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
    finally:
        server.close()


def test_a_server_that_dribbles_is_given_up():
    """A limit that began anew with every piece would wait for this one for ever."""

    def dribble(line):
        line.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        for _ in range(100):
            line.sendall(b" ")
            time.sleep(0.05)

    began = time.monotonic()
    with listening(dribble) as url, pytest.raises(TrainingError, match=r"within 0\.3 seconds"):
        RemoteReward(url, 0.3, retries=0)(*batch(2))
    assert time.monotonic() - began < 4


def test_a_server_that_hangs_up():
    with listening(lambda line: None) as url, pytest.raises(TrainingError) as error:
        RemoteReward(url, retries=1)(*batch(2))
    assert "to 'prompt 0'. What came back: R" in str(error.value)  # RemoteProtocolError, ReadError


def test_when_one_chunk_has_failed_the_others_stop_trying(monkeypatch):
    monkeypatch.setattr(remote_reward, "BACKOFF", 2.0)

    def first_refused(asked, number):
        return (400, b"no") if "prompt 0" in asked["prompts"] else (500, b"busy")

    began = time.monotonic()
    message, _ = fails(first_refused, size=128)
    assert time.monotonic() - began < 2
    assert "status 400" in message


@pytest.mark.parametrize(
    "url", ["http://", "https:///score", "http://host:port/", "http://me:secret@host/score"]
)
def test_what_is_no_such_url(url):
    with pytest.raises(ConfigError, match="--reward") as error:
        load_reward_function(url)
    assert "secret" not in str(error.value)


def test_a_score_beyond_float32_is_told():
    with serving(lambda asked, _: [1e300] * len(asked["rows"])) as (url, _), pytest.raises(
        TrainingError, match="which is not a finite number"
    ):  # fmt: skip
        call_reward_function(load_reward_function(url), *batch(2))


# --- the whole way -------------------------------------------------------------------------------

FEW = ["--size", "tiny", "--threads", "1"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("policy") / "pretrain"
    steps = ["--steps", "6", "--batch", "8", "--window", "32"]
    assert cli.main(["pretrain", *FEW, *steps, "--out", str(out)]) == 0
    return out / "model"


def ppo(policy: Path, out: Path, url: str, *more: str) -> int:
    return cli.main([
        "ppo", *FEW, "--model", str(policy), "--reward", url, "--iterations", "2", "--batch", "40",
        "--minibatch", "20", "--critic-warmup", "1", "--max-new-tokens", "6", "--checkpoint-every",
        "1", "--out", str(out), *more,
    ])  # fmt: skip


def test_ppo_is_paid_by_the_example_server(policy, tmp_path):
    command = [sys.executable, str(SERVER), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            assert ppo(policy, tmp_path / "ppo", url) == 0
        finally:
            server.kill()
    rows = read_metrics(tmp_path / "ppo")
    assert len(rows) == 3
    assert all(0 < row["reward"] <= 1 for row in rows)


def test_the_example_server_says_what_is_wrong():
    spec = importlib.util.spec_from_file_location("reward_server", SERVER)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.score(["?"] * 2, ["", "one two three four five"], [{}] * 2) == [1.0, 10 / 15]
    with ThreadingHTTPServer(("127.0.0.1", 0), example.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = RemoteReward(f"http://127.0.0.1:{server.server_port}/", retries=0)
        assert remote(["?"] * 40, ["a"] * 40, [{}] * 40) == [10 / 11] * 40
        with pytest.raises(TrainingError, match=r"status 500 and .*AttributeError"):
            remote(["?"], [3], [{}])
        server.shutdown()


def test_a_run_that_lost_its_server_goes_on_when_it_is_back(policy, tmp_path, capsys):
    def gone_after_two_rollouts(asked, number):
        return length(asked) if number < 4 else (500, b"out of memory")

    with serving(lambda asked, _: length(asked)) as (url, _):
        assert ppo(policy, tmp_path / "whole", url) == 0
    with serving(gone_after_two_rollouts) as (url, seen):
        assert ppo(policy, tmp_path / "cut", url, "--reward-retries", "0") == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"--reward {url}: no score for the answer" in told
        assert "status 500 and 'out of memory'" in told
        assert len(read_metrics(tmp_path / "cut")) == 2
        seen.clear()  # it is back, and counts anew
        assert ppo(policy, tmp_path / "cut", url, "--reward-timeout", "5") == 0
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flag", "value"), [("--reward-timeout", "0"), ("--reward-timeout", "nan"),
                        ("--reward-retries", "-1")]
)  # fmt: skip
def test_settings_out_of_range(policy, tmp_path, capsys, flag, value):
    assert ppo(policy, tmp_path / "ppo", "http://127.0.0.1:9/", flag, value) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "ppo").exists()
