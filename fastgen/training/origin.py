"""What a run is trained on, its options and its data, so that a resume can tell what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from fastgen.training.errors import CheckpointError

#: Options that may change between the parts of a run: where the data is, where it runs, what it
#: writes when, how long it is (the engine checks that), and what `fastgen eval` measures.
MAY_CHANGE = (
    "data",
    "data_root",
    "engine.cpu",
    "engine.compile",
    "engine.*_every",
    "engine.keep_checkpoints",
    "*.steps",
    "evaluation.*",
)
_HASHED_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 24


@dataclass
class Origin:
    """Options and data of a training.

    Attributes:
        config: the resolved options, nested.
        data: "split tensor" -> number of rows, what a row is, and hash.
    """

    config: dict[str, Any]
    data: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, config: dict[str, Any], dataset: Any) -> Origin:
        """That of a training with these options on this data set."""
        return cls(config, fingerprints(dataset, ("train", "valid", "test")))

    def changes(self, saved: Any) -> list[str]:
        """What is other than in the section of a checkpoint and moves the training, or what is
        reported of it: a text for each option and each tensor of train and valid.

        Raises:
            CheckpointError: the section is damaged.
        """
        seen = {name: f for name, f in self.data.items() if not name.startswith("test ")}
        return changed_options(saved, self.config) + changed_data(saved, seen)


def fingerprints(dataset: Any, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """ "split tensor" -> `fingerprint`, of all tensors in these splits."""
    return {
        f"{split} {name}": fingerprint(value)
        for split in splits
        for name, value in vars(getattr(dataset, split)).items()
        if isinstance(value, Tensor)
    }


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Number of rows, dtype and shape of a row, and SHA-256 of a tensor (N, ...).

    It is hashed in the order of its rows, up to 1 GiB of it; beyond that, rows at even distances
    that make up as much.
    """
    rows, row_bytes = len(tensor), max(tensor[:1].nbytes, 1)
    count = min(rows, max(_HASHED_BYTES // row_bytes, 1))
    digest = hashlib.sha256()
    for chosen in torch.arange(count).split(max(_BLOCK_BYTES // row_bytes, 1)):
        block = tensor[chosen * rows // count].contiguous().flatten()
        digest.update(block.view(torch.uint8).numpy().data)
    return {
        "rows": rows,
        "row": f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}",
        "sha256": digest.hexdigest(),
    }


def changed_options(saved: Any, options: dict[str, Any]) -> list[str]:
    """What differs among the options that decide how a training goes on."""
    with _reading():
        before, after = _flat(saved["config"]), _flat(options)
        names = [n for n in before | after if not any(fnmatch(n, free) for free in MAY_CHANGE)]
        return [
            f"{name} was {_shown(before, name)}, is {_shown(after, name)}"
            for name in names
            if name not in before or name not in after or before[name] != after[name]
        ]


def changed_data(saved: Any, data: dict[str, dict[str, Any]]) -> list[str]:
    """How the data of a checkpoint differs from these `fingerprints`, in the splits they are of."""
    with _reading():
        splits = tuple(f"{name.split()[0]} " for name in data)
        before = {name: f for name, f in saved["data"].items() if name.startswith(splits)}
        texts = [_changed(name, before.get(name), data.get(name)) for name in before | data]
        return [text for text in texts if text is not None]


def _changed(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    if before is None or after is None or before["rows"] != after["rows"]:
        return f"{name}: {_rows(after)}, were {_rows(before)}"
    if before["row"] != after["row"]:
        return f"{name}: {after['row']}, were {before['row']}"
    if before["sha256"] != after["sha256"]:
        return f"{name}: values or their order differ"
    return None


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"section 'origin' of the checkpoint is damaged: {error}") from error


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _shown(options: dict[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "absent"


def _rows(found: dict[str, Any] | None) -> str:
    return "none" if found is None else f"{found['rows']} rows"
