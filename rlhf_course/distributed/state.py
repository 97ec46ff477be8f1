"""What a checkpoint of `ppo-ray` holds, though the controller has no tensor of it."""

from __future__ import annotations

from pathlib import Path


class ClusterState:
    """What a checkpoint holds, wherever its tensors live; see `runs.State`."""

    def __init__(self, trainer):
        self.trainer, self.counters = trainer, trainer.counters()

    def save(self, folder: Path) -> None:
        """Every group writes its models; the folder must be one that all machines see."""
        for group in set(self.trainer.trained.values()):
            group.call("save", folder.absolute())

    def restore(self, folder: Path, counters: dict) -> None:
        """The groups read, and the counters are put back."""
        for group in set(self.trainer.trained.values()):
            group.call("restore", folder.absolute())
        for name, counter in self.counters.items():
            counter.load_state_dict(counters[name])


class Pending(dict):
    """The rollouts under way, by step; in a checkpoint the answers of those that ran ahead, so
    that a resumed run trains on the same."""

    def __init__(self, finish):
        super().__init__()
        self._finish = finish

    def settle(self) -> None:
        """Wait for all of them."""
        for step, handle in self.items():
            self[step] = self._finish(handle)

    def state_dict(self) -> dict:
        """The answers, once they are there."""
        self.settle()
        return {str(step): out for step, out in self.items()}

    def load_state_dict(self, state: dict) -> None:
        """As if they had just come."""
        self.clear()
        self.update({int(step): out for step, out in state.items()})
