"""Images and videos of many rows packed along dimension 0, as Qwen-VL and its kin take them: which rows own which."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

# Packed patches, the grid that says how many of them each image has, and its number in ``mm_token_type_ids``.
_PACKED = (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2))
PACKED_NAMES = frozenset(name for patches, grid, _ in _PACKED for name in (patches, grid))


def packed_entries(tensors: Mapping[str, torch.Tensor], rows: int) -> dict[str, tuple[int, ...]]:
    """Name of a packed tensor, or of its grid -> how many entries of its dimension 0 belong to each row.

    The images of a row are those whose tokens ``mm_token_type_ids`` counts there; without it every row has as many.
    Empty where the batch holds no such tensors, or where the numbers do not fit together.
    """
    entries: dict[str, tuple[int, ...]] = {}
    for patches_name, grid_name, kind in _PACKED:
        patches, grid = tensors.get(patches_name), tensors.get(grid_name)
        if patches is None or grid is None or grid.dim() != 2 or grid.is_floating_point() or not patches.dim():
            continue
        sizes = grid.prod(-1).tolist()
        images = _images_of_rows(sizes, tensors.get("mm_token_type_ids"), kind, rows)
        if images is not None and sum(sizes) == patches.shape[0]:
            starts = [sum(images[:row]) for row in range(rows + 1)]
            entries[grid_name] = tuple(images)
            entries[patches_name] = tuple(sum(sizes[a:b]) for a, b in zip(starts, starts[1:]))
    return entries


def _images_of_rows(sizes: Sequence[int], types: torch.Tensor | None, kind: int, rows: int) -> list[int] | None:
    """How many images each row has; None where that cannot be told."""
    if types is None or types.dim() != 2 or types.shape[0] != rows:
        return [len(sizes) // rows] * rows if len(sizes) % rows == 0 else None
    tokens = (types == kind).sum(-1).tolist()
    if not sum(tokens) or sum(sizes) % sum(tokens):
        return None
    per_token, waiting, images = sum(sizes) // sum(tokens), list(sizes), []
    for count in tokens:
        number, left = 0, count * per_token
        while left > 0 and number < len(waiting):
            left -= waiting[number]
            number += 1
        if left:
            return None
        images.append(number)
        del waiting[:number]
    return None if waiting else images
