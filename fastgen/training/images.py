"""Image grids as PNG."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

_MIN_SIDE = 32
#: A PNG file's own word for what made it, and ours.
_MAKER = ("Software", "fastgen")


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Lay images out in rows, small ones enlarged without smoothing.

    Args:
        images: (N, C, H, W) with C of 1 or 3, N >= 1; values outside [0, 1] are clamped.
        columns: images a row; by default about sqrt(N).
        gap: pixels between images.

    Returns:
        uint8 (C, rows, columns), on the CPU.

    Raises:
        ValueError: no images, or another shape.
    """
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N >= 1, 1 or 3, H, W), got {tuple(images.shape)}")
    factor = math.ceil(_MIN_SIDE / max(images.shape[2:]))
    small = images.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    large = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    columns = columns or math.ceil(math.sqrt(len(large)))
    rows = math.ceil(len(large) / columns)
    channels, height, width = large.shape[1:]
    cells = F.pad(large, (0, gap, 0, gap), value=255)
    blank = cells.new_full((rows * columns - len(cells), channels, height + gap, width + gap), 255)
    grid = torch.cat([cells, blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, :-gap, :-gap]


def png_bytes(images: Tensor, columns: int | None = None) -> bytes:
    """`image_grid` as a PNG file's content, which says that fastgen made it."""
    grid = image_grid(images, columns)
    array = grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)
    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_text(*_MAKER)
    Image.fromarray(array.contiguous().numpy()).save(buffer, format="PNG", pnginfo=notes)
    return buffer.getvalue()


def made_by_fastgen(path: Path) -> bool:
    """Whether a file is a picture of `png_bytes`."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(_MAKER[0]) == _MAKER[1]
    except (OSError, ValueError, SyntaxError):
        return False
