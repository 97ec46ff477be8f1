"""Hugging Face model directories: `config.json` beside `model.safetensors`, read and written.

A directory written here loads with `transformers.AutoModel…from_pretrained`, and one written by
transformers, or fetched from the hub, is read here. Only safetensors and JSON are read: a pickle
can run code when it is opened, so `pytorch_model.bin` is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_course.errors import CheckpointError, ModelError

# What a causal language model's directory may hold that is worth fetching from the hub.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def resolve(name_or_dir: str | os.PathLike) -> Path:
    """The local directory behind a directory path or a hub name (fetched, or from the cache).

    Raises ModelError when it is neither, naming what was tried and what to set when offline.
    """
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    name = str(name_or_dir)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model {name!r}: no such directory. Give a directory with config.json and "
            "model.safetensors, a hub name such as 'openai-community/gpt2', or a size."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else type(error).__name__
        raise ModelError(
            f"model {name!r}: neither a size, nor a local directory, nor in the hub's cache, and "
            f"the hub could not serve it ({why}). Check the name, give a local directory, or set "
            "HF_ENDPOINT to a mirror."
        ) from error


def read_config(directory: str | os.PathLike) -> dict:
    """`config.json` of a model directory. Raises CheckpointError when missing or not JSON."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{directory}: no config.json, so this is not a model directory. "
            "Give the directory that holds config.json and model.safetensors."
        )
    return read_object(path)


def context_of(directory: str | os.PathLike) -> int:
    """The longest sequence that the model of a directory reads, in tokens; 2^20 where nothing is
    said. Raises CheckpointError as `read_config`."""
    config = read_config(directory)
    config = config.get("text_config") or config  # of a model that also sees
    return int(config.get("n_positions") or config.get("max_position_embeddings") or 1 << 20)


def read_object(path: Path) -> dict:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Save the model again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object. Save the model again.")
    return content


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises CheckpointError when one is missing.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"{index}: names no shards. Restore it or save the model again.")
        names = sorted(set(shards.values()))
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not (directory / name).exists()]:
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        hint = f" ({', '.join(pickled)} is a pickle, which is not read)" if pickled else ""
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing{hint}. Save the model with safetensors."
        )
    return [directory / name for name in names]


def read_tensors(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a model directory. Raises CheckpointError for missing or damaged files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: damaged or cut short ({error}). Restore the file or save it again."
            ) from None
    return tensors


def write_model(
    directory: str | os.PathLike, config: dict, tensors: dict[str, torch.Tensor]
) -> None:
    """Write `config.json` and `model.safetensors` into `directory` (made when missing), and for a
    language model `generation_config.json`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    written = {"config.json": config}
    if str((config.get("architectures") or [""])[0]).endswith("LMHeadModel"):
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # what `generate` has to know
        written["generation_config.json"] = {key: config.get(key) for key in ids}
    for name, content in written.items():
        text = json.dumps(content, indent=2, sort_keys=True)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def write_tokenizer(directory: str | os.PathLike, tokenizer) -> dict[str, int | None]:
    """Save the tokenizer beside a model; returns the special ids that belong into config.json."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def load_into(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy `tensors` into `module`; every parameter must be there with its very shape.

    Raises CheckpointError naming the missing, surplus and misshapen tensors: an unfilled parameter
    would train on as random numbers and nobody would notice.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - own.keys())
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''} ({len(names)} in all)"
        for what, names in (
            ("missing", missing),
            ("unknown", surplus),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{where}: the tensors do not fit this model; {'; '.join(problems)}. "
            "Use the checkpoint that belongs to this architecture and size."
        )
    require_finite(tensors, where)
    module.load_state_dict(tensors)


def require_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise CheckpointError naming the first tensor that holds NaN or an infinite number."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{where}: the weight {name} holds NaN or infinite numbers. The training that "
                "wrote it had diverged: repeat it with a lower learning rate, or name another "
                "model."
            )
