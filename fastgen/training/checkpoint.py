"""Checkpoints that a kill cannot break.

A checkpoint is a folder `step-XXXXXXXX` of sections. A section is a tree of dicts, lists and tuples
with tensors and JSON scalars as leaves; its tensors are in `<section>.safetensors`, the rest is in
`<section>.json`. `manifest.json` holds size and SHA-256 of every file. The folder is written under
a temporary name beside, synced to the disk, and renamed, so it either exists whole or not at all.
Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.training.errors import CheckpointError

_FORMAT = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(folder: Path, step: int, sections: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX` atomically and durably, and return its path.

    Raises:
        CheckpointError: it exists, or the disk refuses; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    if final.exists():
        raise CheckpointError(f"{final} exists already; move it away")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        names = [
            name for section, tree in sections.items() for name in _write(temporary, section, tree)
        ]
        manifest = {
            "format": _FORMAT,
            "step": step,
            "files": {n: _describe(temporary / n) for n in names},
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in [*names, _MANIFEST]:
            sync(temporary / name)
        sync(temporary)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {final}: {error}; free space there and use --resume"
        ) from error
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's sections, tensors on the CPU; every file is checked against the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is unknown.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']}, this fastgen reads {_FORMAT}"
            )
        for name, expected in manifest["files"].items():
            found = _describe(path / name)
            if found["bytes"] != expected["bytes"]:
                raise CheckpointError(
                    f"{path / name} is damaged: {found['bytes']} of {expected['bytes']} bytes"
                )
            if found["sha256"] != expected["sha256"]:
                raise CheckpointError(
                    f"{path / name} is damaged: its SHA-256 is not that in {_MANIFEST}"
                )
        names = sorted(name for name in manifest["files"] if name.endswith(".json"))
        return {
            name.removesuffix(".json"): _read(path, name.removesuffix(".json")) for name in names
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({error})") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete-looking checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named step-XXXXXXXX")
    return int(match[1])


def load_newest(folder: Path) -> tuple[Path, dict[str, Any], dict[Path, CheckpointError]]:
    """The newest sound checkpoint: (path, sections, damaged newer ones with what is wrong).

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    problems: dict[Path, CheckpointError] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path), problems
        except CheckpointError as error:
            problems[path] = error
    if problems:
        first = next(iter(problems.values()))
        raise CheckpointError(f"no sound checkpoint in {folder}: {first}; restore it or train anew")
    raise CheckpointError(f"no checkpoint in {folder}; train the run first")


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what a killed writer left."""
    for path in list_checkpoints(folder)[:-keep]:
        doomed = path.with_name(f".tmp-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)  # a kill in the middle must not leave half a checkpoint
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a kill, sees either the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _write(folder: Path, section: str, tree: Any) -> list[str]:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, "", tensors))
    plain, binary = folder / f"{section}.json", folder / f"{section}.safetensors"
    plain.write_text(text)
    save_file(tensors, binary)
    binary.chmod(plain.stat().st_mode)  # safetensors makes files that only their owner can read
    return [plain.name, binary.name]


def _read(folder: Path, section: str) -> Any:
    mapped = load_file(folder / f"{section}.safetensors")
    tensors = {name: value.clone() for name, value in mapped.items()}  # free of the file's fate
    return _decode(json.loads((folder / f"{section}.json").read_bytes()), tensors)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two tensors of a checkpoint have the name {name!r}")
        # clone: safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [[key, _encode(item, _join(name, key), tensors)] for key, item in value.items()]
        }
    if isinstance(value, (list, tuple)):
        items = [_encode(item, _join(name, i), tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"checkpoint value {name!r} must be a tensor or a JSON scalar, got {type(value)}"
    )


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {key: _decode(item, tensors) for key, item in value["dict"]}
