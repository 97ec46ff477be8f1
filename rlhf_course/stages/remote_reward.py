"""PPO's scores from a server: `--reward http://host:port/path`.

Each request is a POST of {"prompts": […], "responses": […], "rows": […]}, three lists of the same
length, at most 32; the answer to it is {"scores": […]}, one finite number for each, in order.
`examples/reward_server.py` is such a server.
"""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from rlhf_course.errors import ConfigError, TrainingError

CHUNK = 32  # answers in a request
IN_FLIGHT = 4  # requests at a time
BACKOFF = 0.5  # seconds before the first repetition; each further one waits twice as long
LARGEST = 1_000_000  # bytes of 32 scores, generously
LOCAL = ("localhost", "127.0.0.1", "::1")


class _Failed(Exception):
    """A request brought no scores; the text says what came instead. again: the same request may
    succeed later. nobody: no server was there, so it is no answer's fault."""

    def __init__(self, text: str, again: bool = True, nobody: bool = False):
        super().__init__(text)
        self.again, self.nobody = again, nobody


class RemoteReward:
    """A reward function, (prompts, responses, rows) -> scores, that asks a server.

    timeout: seconds for each request. retries: how often one that failed is sent again. Raises
    ConfigError for what is no such URL, and when called TrainingError naming the answer that the
    server does not score.
    """

    def __init__(self, url: str, timeout: float = 60, retries: int = 3):
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--reward {url!r}: not a URL ({error}).") from None
        if not self.url.host or self.url.userinfo:  # a password would stand in config.json
            raise ConfigError("--reward: give http://host:port/path, without user or password.")
        self.timeout, self.retries = timeout, retries

    def __call__(self, prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
        asked = list(zip(prompts, responses, rows, strict=True))
        chunks = [asked[i : i + CHUNK] for i in range(0, len(asked), CHUNK)]
        # A proxy that the environment names is for the world outside.
        client = httpx.Client(timeout=self.timeout, trust_env=self.url.host not in LOCAL)
        stop = threading.Event()  # one chunk has failed for good: the others need not wait for more
        with client, ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                parts = pool.map(lambda chunk: self._chunk(client, chunk, stop), chunks)
                return [score for part in parts for score in part]
            finally:
                stop.set()

    def _chunk(self, client: httpx.Client, chunk: list, stop: threading.Event) -> list[float]:
        """The scores of one request; where it fails, of one request for each answer."""
        try:
            return self._insist(client, chunk, stop)
        except _Failed as failure:
            if failure.nobody or stop.is_set():
                raise self._error(failure, chunk[0]) from failure
        scores = []
        for one in chunk:
            try:
                scores += self._insist(client, [one], stop)
            except _Failed as failure:
                raise self._error(failure, one) from failure
        return scores

    def _insist(self, client: httpx.Client, asked: list, stop: threading.Event) -> list[float]:
        """The scores of a request that is sent again until they come, or the retries are over."""
        for attempt in range(self.retries):
            try:
                return self._ask(client, asked)
            except _Failed as failure:
                if not failure.again or stop.wait(BACKOFF * 2**attempt):
                    raise
        return self._ask(client, asked)

    def _ask(self, client: httpx.Client, asked: list) -> list[float]:
        """One request. Raises _Failed for everything but scores."""
        names, columns = ("prompts", "responses", "rows"), zip(*asked, strict=True)
        body = json.dumps(dict(zip(names, map(_plain, columns), strict=True)))
        headers = {"content-type": "application/json"}
        until, content = time.monotonic() + self.timeout, bytearray()
        try:
            with client.stream("POST", self.url, content=body, headers=headers) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > until:  # httpx's own limit is one for each piece
                        raise httpx.ReadTimeout("")
                    if len(content) > LARGEST:
                        raise _Failed(f"it went on beyond {LARGEST} bytes: {short(content)}")
        except httpx.TimeoutException as error:
            nobody = isinstance(error, httpx.ConnectTimeout)
            raise _Failed(f"no answer within {self.timeout:g} seconds", nobody=nobody) from error
        except httpx.RequestError as error:
            nobody = isinstance(error, httpx.ConnectError)
            raise _Failed(f"{type(error).__name__}: {error}", nobody=nobody) from error
        text = content.decode("utf-8", "replace")
        if response.status_code != httpx.codes.OK:
            busy = httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS
            again = response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
            again = again or response.status_code in busy
            raise _Failed(f"status {response.status_code} and {short(text)}", again)
        try:
            scores = list(json.loads(text)["scores"])
            good = all(isinstance(s, (int, float)) and math.isfinite(s) for s in scores)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            scores, good = [], False
        if not good or len(scores) != len(asked):
            raise _Failed(f"{short(text)} instead of {{'scores': [{len(asked)} finite numbers]}}")
        return scores

    def _error(self, failure: _Failed, asked: tuple) -> TrainingError:
        prompt, response, _ = asked
        return TrainingError(
            f"--reward {self.url}: no score for the answer {short(response)} to {short(prompt)}. "
            f"What came back: {failure}. Mend or start the server (--reward-timeout gives it more "
            "time) and start the same command again: the run goes on from its last checkpoint."
        )


def _plain(value: object) -> object:
    """As JSON can say it: NaN in a data set's column becomes null, a date its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def short(value: object, most: int = 120) -> str:
    """A value as Python writes it, without its middle where that is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
