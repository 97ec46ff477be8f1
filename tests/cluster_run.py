"""A run of `rlhf-course ppo-ray` whose processes are killed at chosen moments.

    python -m tests.cluster_run PLAN.json -- ppo-ray --size tiny …

PLAN: [[step, method, victim], …]. When at that step the controller has called `method` on the
workers ("score", "update_actor", "update_critic", "sync", "save") or on the engines ("generate"),
or begins with the held-out prompts ("held out", the step is then the last one), the victim gets
SIGKILL: a name of `Cluster.named`, or "controller", which is this process. What has happened is
written to PLAN.json.log, a line each, with its time.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from rlhf_course import cli


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
