"""What lies in a folder of checkpoints, for people and scripts."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeengine.checkpoint.manifest import MANIFEST, Manifest, read_manifest, sizes_fit, verify
from pipeengine.checkpoint.step_folders import candidates
from pipeengine.errors import InputError


def look_at(folder: Path, *, thorough: bool, first_whole: bool = False) -> list[dict[str, Any]]:
    """One row per checkpoint in ``folder``, or of the one that it is, the newest first; plain values.

    ``name``, ``problem`` (None where it is whole), ``verified``, ``bytes``, ``facts`` of the manifest, and ``files``
    with their bytes and number of tensors. ``thorough`` compares every byte, else only sizes; ``first_whole`` stops
    there.
    """
    paths = [folder] if (folder / MANIFEST).exists() else [folder / name for name in candidates(folder)]
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows.append(_row(path, thorough))
        if first_whole and rows[-1]["problem"] is None:
            break
    return rows


def _row(path: Path, thorough: bool) -> dict[str, Any]:
    try:
        manifest = read_manifest(path)
        if thorough:
            verify(manifest)
        elif not sizes_fit(manifest):
            raise InputError("files are missing or have another size; pipeengine checkpoint verify says which")
    except InputError as error:
        return {"name": path.name, "problem": str(error), "verified": thorough}
    return {"name": path.name, "problem": None, "verified": thorough, "bytes": manifest.data_bytes,
            "facts": dict(manifest.facts), "files": _files(manifest)}


def _files(manifest: Manifest) -> dict[str, dict[str, int | None]]:
    return {name: {"bytes": entry["bytes"], "tensors": len(entry["tensors"]) if "tensors" in entry else None}
            for name, entry in manifest.files.items()}
