"""A reward server: any function of prompts and answers, asked over HTTP.

    python examples/reward_server.py --port 8000
    rlhf-course ppo --data prompts.jsonl --model DIR --reward http://127.0.0.1:8000/score

The trainer POSTs {"prompts": […], "responses": […], "rows": […]}, at most 32 of each, several
requests at a time, and wants {"scores": […]}, one number for each answer. Whatever goes wrong is
answered with status 500 and the reason, which the trainer shows once it has given up. Only this
machine is listened to: there is no password, so put a gate in front of it before you open it.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(prompts: list, responses: list[str], rows: list[dict]) -> list[float]:
    """Put your own here. This one likes short answers: 1 for none, 0.5 for ten words."""
    return [10 / (10 + len(response.split())) for response in responses]


class Handler(BaseHTTPRequestHandler):
    """POST to any path is scored."""

    protocol_version = "HTTP/1.1"  # keeps the connection for the next request
    wbufsize = -1  # headers and body leave together

    def do_POST(self) -> None:
        """Read one request, score it, answer."""
        status, body = 200, {}
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["scores"] = score(asked["prompts"], asked["responses"], asked["rows"])
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the trainer is told
            status, body = 500, {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Not a line for every request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the function `score` as a reward.")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    with ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/score", flush=True)
        server.serve_forever()
