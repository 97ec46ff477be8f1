"""Run a notebook from top to bottom, and keep only outputs that belong in a repository."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_course.coursework import project, references
from rlhf_course.errors import ConfigError

if TYPE_CHECKING:
    from nbformat import NotebookNode

LARGEST = 1_500_000  # bytes of a solution's file
LONGEST = {"stdout": 40, "stderr": 10}  # lines that one cell may print
PATIENCE = 1200  # seconds that one cell may take
BOOT = "boot"
"""The id of the cell that sees to the course's installation."""
OURS = "rlhf_course"
"""Under this name the builder keeps its notes in a notebook's metadata."""
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,}")  # <Figure object at 0x…>: another one in each run
PLACE = re.compile(r"(?<![\w.}/:-])/(?:root|work|home|Users|tmp|private/var|mnt)/\w[^\s'\"<]*")
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")


def execute(notebook: NotebookNode, environment: dict[str, str] | None = None) -> None:
    """Run all cells, in this Python and in an empty folder; the outputs are put into the notebook.

    environment: variables to set besides. Raises ConfigError with the failing cell and traceback.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    variables = {**os.environ, **(environment or {})}
    variables.pop("MPLBACKEND", None)  # the kernel's own draws figures into the notebook
    if (project.ROOT / "pyproject.toml").exists():  # a clone need not be installed
        known = variables.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([*([known] if known else []), str(project.ROOT)])
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            kernel_manager_class=_kernel_manager(),
            timeout=PATIENCE,
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute(env=variables)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise ConfigError(f"a cell failed.\n{_plain(str(error))}") from error


def _kernel_manager() -> type:
    """A manager whose kernels are always this very Python, whatever is installed beside it."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    quiet = "--IPKernelApp.log_level=40"

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=[*command, quiet], display_name="Python 3", language="python")

    class Manager(AsyncKernelManager):
        def __init__(self, **settings):
            super().__init__(**{**settings, "kernel_spec_manager": ThisPython()})

    return Manager


def _plain(text: str) -> str:
    """Without the escape sequences that colour a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --------------------------------------------------------------------------------- what is kept


def clean(notebook: NotebookNode) -> None:
    """Drop what a run leaves behind beside its outputs: times, widgets without their state."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in WIDGETS:
                if data.pop(kind, None) is not None:
                    data.pop("text/plain", None)  # "HBox(children=(…))"
            if data or output.output_type not in ("display_data", "execute_result"):
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept


def problems(notebook: NotebookNode) -> list[str]:
    """What forbids to commit these outputs: errors, places on this machine, walls of text,
    pictures that say nothing to who cannot see them."""
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        outputs = cell.get("outputs", [])
        where = f"cell {number} ({cell.id})"
        for output in outputs:
            found += [f"{where}: {problem}" for problem in _problems_of(output)]
        for name, most in LONGEST.items():
            text = "".join(o.text for o in outputs if o.get("name") == name)
            if (count := len(text.splitlines())) > most:
                found.append(f"{where}: {count} lines of {name}: {text[:200]!r} …")
    return found


def _problems_of(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "error":
        yield f"{output.ename}: {output.evalue}"
    for kind, text in texts(output).items():
        place = PLACE.search(text) or re.search(re.escape(str(Path.home())) + r"\b", text)
        if place and len(place[0]) > 1:
            yield f"names a place on this machine in {kind}: {place[0]!r}"
        if address := ADDRESS.search(text):
            yield f"shows an object's address in {kind}, not its value: {address[0]!r}"
    if not all(alternatives(output)):
        yield "a picture without alt text: use lab.show(figure, alt=…)"


def texts(output: NotebookNode) -> dict[str, str]:
    """The output's texts by their kind; pictures, which are base64, are left out."""
    if output.output_type == "stream":
        return {output.name: output.text}
    data = output.get("data", {})
    return {kind: str(text) for kind, text in data.items() if not kind.startswith("image/png")}


def alternatives(output: NotebookNode) -> list[str]:
    """The alt text of each picture in the output, "" where it has none."""
    data, found = output.get("data", {}), []
    if "text/html" in data:
        found = _alternatives_in(str(data["text/html"]))
    elif "image/png" in data:
        entry = output.get("metadata", {}).get("image/png", {})
        found = [entry.get("alt", "") if isinstance(entry, dict) else ""]
    return found


def _alternatives_in(html: str) -> list[str]:
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list) -> None:
            if tag == "img":
                found.append(dict(attributes).get("alt") or "")

    Reader().feed(html)
    return found


# --------------------------------------------------------------------------------- is it stale?


def fingerprint(notebook: NotebookNode) -> str:
    """A hash of all that the outputs come from: the code cells in their order, and the package's
    functions and classes that they name. Prose is not in it, nor is the boot cell, which does
    nothing where the course is installed.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code = [cell.source for cell in cells if cell.get("id") != BOOT]
    parts = [*code, *references.texts(code)]
    return hashlib.sha256("\n\0".join(parts).encode()).hexdigest()


def take_outputs(notebook: NotebookNode, executed: NotebookNode) -> bool:
    """Carry outputs over from an executed notebook of the same code; False where it has another."""
    stamp = fingerprint(notebook)
    if executed.metadata.get(OURS, {}).get("fingerprint") != stamp:
        return False
    old, new = ([c for c in n.cells if c.cell_type == "code"] for n in (executed, notebook))
    if len(old) != len(new):
        return False
    for source, target in zip(old, new, strict=True):
        target.outputs, target.execution_count = source.outputs, source.execution_count
    notebook.metadata[OURS] = {"fingerprint": stamp}
    return True
