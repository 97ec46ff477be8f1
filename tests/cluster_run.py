"""A run of `rlhf-course ppo-ray` whose processes are killed at chosen moments.

    python -m tests.cluster_run PLAN.json -- ppo-ray --size tiny …

PLAN: [[step, method, victim], …]. When at that step the controller has called `method` on the
workers ("score", "update_actor", "update_critic", "sync", "save") or on the engines ("generate"),
or begins with the held-out prompts ("held out", the step is then the last one), the victim gets
SIGKILL: a name of `Cluster.named`, or "controller", which is this process. What has happened is
written to PLAN.log, a line each, with its time. `Ran` starts such a run and looks at what is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from rlhf_course import cli


class Ran:
    """One `ppo-ray` in a process of its own, to its end or its death."""

    def __init__(self, arguments: list[str], out: Path, plan=(), patience: float | None = 900):
        self.mark, self.out = uuid.uuid4().hex, out
        file = out.with_name(f"{out.name}-{self.mark}.json")
        file.write_text(json.dumps(list(plan)))
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.cluster_run", str(file), "--", *arguments]
        done = subprocess.run(
            [*command, "--out", str(out)],
            env={**os.environ, "RLHF_MARK": self.mark, "PYTHONWARNINGS": "ignore"},
            capture_output=True, text=True, timeout=patience, check=False,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        self.seconds = time.monotonic() - began
        self.code, self.said = done.returncode, " ".join((done.stdout + done.stderr).split())
        self.log = [line.split(" ", 1) for line in self._log(file)]

    @staticmethod
    def _log(file: Path) -> list[str]:
        log = file.with_suffix(".log")
        return log.read_text().splitlines() if log.exists() else []

    def after_kill(self, until: str) -> list[float]:
        """Seconds from each kill to the next line that begins with `until`."""
        out = []
        for i, (when, what) in enumerate(self.log):
            if what.startswith("kill"):
                later = [float(t) for t, said in self.log[i + 1 :] if said.startswith(until)]
                out += [later[0] - float(when)] if later else []
        return out

    def orphans(self, patience: float = 90.0) -> list[str]:
        """Processes of this run that are still there after `patience` seconds; where the controller
        was killed, Ray's own two agents take most of a minute to notice."""
        deadline = time.monotonic() + patience
        while True:
            found = []
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        found.append((folder / "cmdline").read_text().replace("\0", " "))
                except OSError:  # gone, or not ours
                    continue
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


def arm(plan: list, log: Path) -> None:
    """Put the traps into the controller."""
    from ray._private.state import state

    from rlhf_course.distributed.cluster import Cluster, Group
    from rlhf_course.distributed.controller import RayTrainer

    now = {"step": 0}

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{time.time():.2f} {what}\n")

    def trap(cluster, method: str) -> None:
        for entry in plan:
            if entry[:2] == [now["step"], method]:
                plan.remove(entry)
                note(f"kill {entry}")
                if entry[2] == "controller":
                    os.kill(os.getpid(), signal.SIGKILL)
                actor = cluster.named[entry[2]]
                os.kill(state.actor_table(actor._actor_id.hex())["Pid"], signal.SIGKILL)
                return

    def trapped(original, cluster_of):
        def call(self, method, *args):
            futures = original(self, method, *args)
            trap(cluster_of(self), method)
            return futures

        return call

    Group.start = trapped(Group.start, lambda group: group.cluster)
    Group.scatter = trapped(Group.scatter, lambda group: group.cluster)
    ask, iterate, clear = RayTrainer.ask, RayTrainer.iterate, Cluster.clear
    held = RayTrainer.held_out_reward

    def asking(self, *args):
        handle = ask(self, *args)
        trap(self.cluster, "generate")
        return handle

    def iterating(self, step):
        now["step"] = step
        note(f"step {step}")
        out = iterate(self, step)
        note(f"done {step}")
        return out

    def clearing(self):
        note("clear")
        clear(self)

    def holding(self):
        trap(self.cluster, "held out")
        return held(self)

    RayTrainer.ask, RayTrainer.iterate, Cluster.clear = asking, iterating, clearing
    RayTrainer.held_out_reward = holding


if __name__ == "__main__":
    split = sys.argv.index("--")
    plan = Path(sys.argv[1])
    arm(json.loads(plan.read_text()), plan.with_suffix(".log"))
    sys.exit(cli.main(sys.argv[split + 1 :]))
