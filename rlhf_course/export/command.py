"""`rlhf-course export`: the same stage in OpenRLHF, TRL or verl.

    rlhf-course export --to trl --run runs/town-small-seed0/sft
    rlhf-course export --to openrlhf --stage dpo --data pairs.jsonl --model runs/my/sft/model

Writes a folder with the data in the library's schema and `run.sh`, and prints that script. Nothing
is run: the other library is installed by whoever runs it.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_course.errors import ConfigError
from rlhf_course.export import openrlhf, trl, verl
from rlhf_course.export.settings import ExportConfig
from rlhf_course.export.source import Source, read_source
from rlhf_course.files import replacing, require_writable
from rlhf_course.progress import console

LIBRARIES = {"openrlhf": openrlhf, "trl": trl, "verl": verl}
NAMES = {"openrlhf": "OpenRLHF", "trl": "TRL", "verl": "verl"}


def title_of(asked: ExportConfig, source: Source) -> str:
    """What the script says about itself."""
    name = f"{NAMES[asked.to]} {LIBRARIES[asked.to].VERSION}"
    return f"rlhf-course {source.stage.replace('_', '-')}, as {name} does it."


def export(asked: ExportConfig) -> Path:
    """Write the folder; returns it. Raises ConfigError where it is not empty, or where the library
    has no such stage."""
    stage = asked.stage or (asked.run and asked.run.name) or ""
    folder = Path(asked.out or Path("exports") / f"{asked.to}-{stage.replace('_', '-')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder}: not empty. Choose another folder, or clear it.")
    require_writable(folder)
    source = read_source(asked)
    library = LIBRARIES[asked.to]
    command = library.command(source)
    script = command.script(title_of(asked, source))
    with replacing(folder) as part:
        part.mkdir()
        library.write_rows(source, part)
        files = dict(command.files)
        if source.template:
            files["chat_template.jinja"] = source.template
        for name, text in {**files, "run.sh": script}.items():
            (part / name).write_text(text, encoding="utf-8", newline="\n")
        (part / "run.sh").chmod(0o755)
    console.print(script, markup=False, highlight=False, soft_wrap=True)
    held = f", {len(source.held)} held out" if source.held else ""
    console.print(f"{len(source.train)} rows{held} → {folder}", soft_wrap=True)
    return folder
