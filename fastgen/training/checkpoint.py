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
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.training.errors import CheckpointError, WriteError

_FORMAT = 1
_MANIFEST = "manifest.json"
_SHOWN = 40
_NAME = re.compile(r"step-(\d{8,})")
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    SafetensorError,
)


def save_checkpoint(folder: Path, step: int, sections: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX` atomically and durably, and return its path.

    Raises:
        CheckpointError: it exists.
        WriteError: the disk refuses; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    if final.exists():
        raise CheckpointError(f"{final} exists already; move it away")
    try:
        folder.mkdir(exist_ok=True)
        remove(temporary)
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
        raise WriteError(
            f"cannot write {final}: {error}; free space there and use --resume"
        ) from error
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's sections, tensors on the CPU; every file is checked against the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered, the folder has the name of another
            step, or the format is unknown.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']}, this fastgen reads {_FORMAT}"
            )
        step = manifest["step"]
        if _NAME.fullmatch(path.name) and checkpoint_step(path) != step:
            raise CheckpointError(f"{path} is the checkpoint of step {step}, under another name")
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{path} is damaged: {name!r} is no name of a file in it")
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
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({error})") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete-looking checkpoints of a folder, oldest first; none if it does not exist."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; move it away")
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
    """Delete all but the last `keep` checkpoints, and what a killed writer left.

    Raises:
        WriteError: the disk refuses.
    """
    try:
        for path in list_checkpoints(folder)[:-keep]:
            doomed = path.with_name(f".tmp-{path.name}")
            remove(doomed)
            os.rename(path, doomed)  # a kill in the middle must not leave half a checkpoint
        for leftover in folder.glob(".tmp-*"):
            remove(leftover)
    except OSError as error:
        raise WriteError(f"cannot delete old checkpoints in {folder}: {error}") from error


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be written anew; return its new path.

    Raises:
        WriteError: the disk refuses.
    """
    aside, count = path.with_name(f"damaged-{path.name}"), 1
    while aside.exists() or aside.is_symlink():
        count += 1
        aside = path.with_name(f"damaged-{path.name}-{count}")
    try:
        os.rename(path, aside)
    except OSError as error:
        raise WriteError(f"cannot rename the damaged {path}: {error.strerror}") from error
    return aside


def check_like(value: Any, template: Any, name: str) -> None:
    """Hold a tree of a checkpoint to one of the same names, types, shapes and dtypes.

    Numbers must be finite; what tensors hold is not looked at.

    Raises:
        CheckpointError: the first difference, with its place below `name`.
    """
    if isinstance(template, dict):
        _check_type(value, dict, name)
        for key in [*template, *value]:
            if key not in value:
                raise CheckpointError(f"{_join(name, key)} is missing in the checkpoint")
            if key not in template:
                raise CheckpointError(f"{_join(name, key)} of the checkpoint has no place here")
            check_like(value[key], template[key], _join(name, key))
    elif isinstance(template, (list, tuple)):
        _check_type(value, type(template), name)
        if len(value) != len(template):
            raise CheckpointError(f"{name} must have {len(template)} items, got {len(value)}")
        for i, (item, wanted) in enumerate(zip(value, template, strict=True)):
            check_like(item, wanted, _join(name, i))
    elif isinstance(template, Tensor):
        _check_type(value, Tensor, name)
        if (value.dtype, value.shape) != (template.dtype, template.shape):
            raise CheckpointError(
                f"{name} must be {_kind(template)}, got {_kind(value)} in the checkpoint"
            )
    else:
        _check_type(value, type(template), name)
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{name} must be finite, got {value} in the checkpoint")


def check_finite(tensors: dict[str, Tensor], name: str) -> None:
    """Refuse tensors of a checkpoint with NaN or infinity in them.

    Raises:
        CheckpointError: the first of them.
    """
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{_join(name, key)} of the checkpoint holds NaN or infinity")


def _check_type(value: Any, expected: type, name: str) -> None:
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        got = "a tensor" if isinstance(value, Tensor) else repr(value)[:_SHOWN]
        raise CheckpointError(f"{name} must be {expected.__name__}, got {got} in the checkpoint")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def remove(path: Path) -> None:
    """Delete whatever has that name: a file, a link or a folder with all in it; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
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
        if value["tensor"] not in tensors:
            raise ValueError(f"tensor {value['tensor']!r} is missing")
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {key: _decode(item, tensors) for key, item in value["dict"]}
