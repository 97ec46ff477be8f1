"""One self-contained page about a workspace: what was run, what came out, how to repeat it.

    from rlhf_course.report import build_report
    build_report(Path("runs/town-small-seed0"))          writes report.html there

A workspace holds run folders (pretrain, sft, reward_model, ppo; `ppo_*` are ablations and
`reward_model_*` alternatives) and evaluation.json. Whatever is missing is left out of the page.
The page is a single file: figures are embedded as SVG, there is no script, and nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_course.errors import ConfigError
from rlhf_course.report.page import document
from rlhf_course.report.sections import SECTIONS
from rlhf_course.report.workspace import Workspace
from rlhf_course.runs import replacing

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["build_report", "summary_table"]


def build_report(workspace: Path | str) -> Path:
    """Write `workspace/report.html` (atomically) from the run folders and evaluation.json there.

    Returns its path. Raises ConfigError when there is neither a run nor an evaluation, and
    CheckpointError when a file is damaged or the page cannot be written.
    """
    found = Workspace.read(Path(workspace))
    if not found.runs and not found.evaluation:
        raise ConfigError(
            f"{found.path}: no run folder and no evaluation.json, so there is nothing to report. "
            "Give the folder that `rlhf-course demo` wrote, such as runs/town-small-seed0."
        )
    written = [(anchor, title, make(found)) for anchor, title, make in SECTIONS]
    page = document(found.title, found.subtitle, [part for part in written if part[2]])
    path = found.path / "report.html"
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def summary_table(evaluation: Mapping) -> Table:
    """The bars and what was reached, for the terminal; then seconds and memory."""
    from rich.table import Table
    from rich.text import Text

    parts = [str(evaluation[k]) for k in ("world", "size") if k in evaluation]
    parts += [f"seed {evaluation['seed']}"] if "seed" in evaluation else []
    table = Table(title=Text(", ".join(parts)), title_justify="left")
    for heading, justify in (("what", "left"), ("value", "right"), ("bar", "right"), ("", "left")):
        table.add_column(heading, justify=justify)
    for bar in evaluation.get("bars", []):
        met = Text("met", style="green") if bar["met"] else Text("missed", style="bold red")
        wanted = f"{bar['comparison']} {bar['bar']:g}"
        table.add_row(Text(bar["name"]), f"{bar['value']:.3g}", wanted, met)
    table.add_section()
    seconds = math.fsum(evaluation.get("seconds", {}).values())
    if seconds:
        table.add_row("all stages, minutes", f"{seconds / 60:.1f}", "", "")
    if evaluation.get("memory_gb") is not None:
        table.add_row("peak memory, GB", f"{evaluation['memory_gb']:.2f}", "", "")
    return table
