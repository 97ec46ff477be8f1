"""Progress of a stage: a live bar with an estimate in a terminal or a notebook, sparse plain lines
in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)
error_console = Console(highlight=False, stderr=True)

LINE_EVERY = 15.0  # seconds between two lines when the output is not a terminal
DRAW_EVERY = 0.5  # seconds between two drawings in a notebook
SHOWN = 5  # metrics beside the bar


class Bar:
    """One stage's progress."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.metrics = label, total, ""
        self._progress = self._notebook = None
        if console.is_jupyter:
            self._notebook = NotebookLine()
        elif console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[metrics]}"),
                console=console,
            )
            self._task = self._progress.add_task(label, total=total, metrics="")

    def start(self, done: int = 0) -> None:
        """Begin at `done` steps (more than 0 after a resume)."""
        self._began = self._last = time.monotonic()
        self._first = done
        if done:
            console.print(f"{self.label}: going on at step {done} of {self.total}")
        if self._progress:
            self._progress.update(self._task, completed=done)
            self._progress.start()

    def advance(self, done: int, seconds: float = 0.0) -> None:
        """`done` steps are complete."""
        if self._progress:
            self._progress.update(self._task, completed=done, metrics=self.metrics)
            return
        now = time.monotonic()
        pause = DRAW_EVERY if self._notebook else LINE_EVERY
        if now - self._last >= pause or done == self.total:
            spent = now - self._began
            left = spent / max(done - self._first, 1) * (self.total - done)
            if self._notebook:
                self._notebook.show(self.label, done, self.total, spent, left)
                self._last = now
                return
            console.print(
                f"{self.label} {done}/{self.total}  {spent:.0f} s, {left:.0f} s to go  "
                f"{self.metrics}", soft_wrap=True,
            )  # fmt: skip
            self._last = now

    def show(self, metrics: dict[str, float]) -> None:
        """Remember the first few metrics; they appear with the next step."""
        self.metrics = "  ".join(f"{k} {v:.3g}" for k, v in list(metrics.items())[:SHOWN])

    def close(self) -> None:
        """Stop drawing."""
        if self._progress:
            self._progress.stop()


class NotebookLine:
    """One line of a notebook's output that is written over as the work goes on."""

    def __init__(self):
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)

    def show(self, label: str, done: int, total: int, spent: float, left: float) -> None:
        """Draw the bar; at the end only what was done and how long it took stays."""
        text = f"{label}: {done} of {total} steps, {spent:.0f} s"
        if done < total:
            bar = f'<progress value="{done}" max="{total}" style="width: 20em"></progress>'
            text = f"{bar} {text}, about {left:.0f} s to go"
        self._handle.update(self._html(f"<small>{text}</small>"))
