"""A folder of JSON lines and a tokenizer, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_course.errors import ConfigError


def write_folder(
    folder: str | os.PathLike,
    tables: dict[str, Iterable[dict[str, Any]]],
    tokenizer,
    description: dict[str, Any],
) -> None:
    """Write <stem>.jsonl for every table, tokenizer/ and world.json.

    All goes into a hidden folder beside the target, which is renamed at the end, so that a full
    disk or an interrupt leaves nothing behind.

    Args:
        folder: a new or an empty folder.
        tables: file stem -> rows.
        tokenizer: anything with `save_pretrained`.
        description: what world.json shall say.

    Raises:
        ConfigError: the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; name another folder, or clear it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for stem, rows in tables.items():
            with open(partial / f"{stem}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        tokenizer.save_pretrained(partial / "tokenizer")
        with open(partial / "world.json", "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        if folder.exists():
            folder.rmdir()  # empty, as checked; Windows does not rename onto a folder
        os.replace(partial, folder)
    except Exception as error:
        # The tokenizers library tells of a full disk in a bare Exception, "… (os error 28)".
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        raise ConfigError(
            f"cannot write to {folder}: {error}; nothing was kept. Free space, or name another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
