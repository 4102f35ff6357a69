"""What a whole checkpoint holds: every file, every tensor, every digest; and the check that it does.

``manifest.json`` is written last, so that a folder without it is half of one. Its own text is digested in its last
line: it is whole when writing what was read gives the same bytes.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeengine.checkpoint.disk import explained, open_regular, read_small
from pipeengine.checkpoint.tensor_file import CHUNK_BYTES, DTYPES, Entry, TensorFile
from pipeengine.errors import InputError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
MOST_JSON_BYTES = 1 << 28
_AGAIN = "copy the checkpoint again, or use another one"


@dataclass(frozen=True)
class Manifest:
    """``files`` by name: ``bytes`` with ``digest``, or for tensors ``header`` and ``tensors``; ``facts`` is the rest
    (step, model, plan, versions)."""

    path: Path
    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def step(self) -> int:
        """The user's number of the step after which it was saved."""
        return self.facts["step"]

    @property
    def data_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.files.values())

    def tensor_files(self, prefix: str) -> dict[str, str]:
        """Names of tensors -> the first file that begins with ``prefix`` and has them."""
        places: dict[str, str] = {}
        for file in sorted(self.files):
            if file.startswith(prefix):
                for name in self.files[file].get("tensors", ()):
                    places.setdefault(name, file)
        return places


def manifest_text(facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest as a file. The same values give the same bytes."""
    body = json.dumps({"format": FORMAT, **facts, "files": dict(sorted(files.items()))}, indent=1, ensure_ascii=False,
                      allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-2]},\n "digest": "{digest}"\n}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, itself verified. Raises ``InputError`` that names the file for any damage."""
    path = folder / MANIFEST
    if not folder.is_dir() or folder.is_symlink():
        raise InputError(f"{folder} is no folder of a checkpoint; {_AGAIN}")
    text = read_small(path, MOST_JSON_BYTES)
    data = parse_json(text, path)
    facts = {key: value for key, value in data.items() if key not in ("format", "files", "digest")}
    files = data.get("files")
    if data.get("format") != FORMAT or not isinstance(files, dict):
        raise InputError(f"{path} has format {str(data.get('format'))[:20]}, this version reads {FORMAT}; use the "
                         "version that wrote it")
    problems = (f"{name[:80]!r} {what}" for name, entry in files.items() if (what := _wrong_file(name, entry)))
    problem = next(problems, None)
    if problem is None and not (_is_count(facts.get("step")) and _is_number_of_workers(facts.get("workers"))):
        problem = f"step is {str(facts.get('step'))[:20]}, workers {str(facts.get('workers'))[:20]}"
    if problem is not None:
        raise InputError(f"{path} is no manifest: {problem}; {_AGAIN}")
    if manifest_text(facts, files) != text:
        raise InputError(f"{path} is damaged: its digest is not that of its text; {_AGAIN}")
    return Manifest(folder, facts, files)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``InputError`` that names ``path``."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {str(error)[:100]}; {_AGAIN}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: it holds a {type(data).__name__}; {_AGAIN}")
    return data


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number_of_workers(value: object) -> bool:
    return type(value) is int and 1 <= value <= 1_000_000


def _wrong_file(name: str, entry: object) -> str | None:
    """What is wrong with what a manifest says of a file."""
    if Path(name).name != name or name.startswith(".") or name == MANIFEST or "\\" in name or "\0" in name:
        return "is no name of a file in the folder"
    if not isinstance(entry, dict) or not _is_count(entry.get("bytes")):
        return "has no number of bytes"
    tensors = entry.get("tensors")
    if tensors is None:
        return None if isinstance(entry.get("digest"), str) else "has no digest"
    if not isinstance(tensors, dict) or not isinstance(entry.get("header"), str):
        return "has no digests"
    wrong = next((tensor for tensor, one in tensors.items() if not _is_tensor(one)), None)
    return None if wrong is None else f"says nothing true of {wrong[:80]!r}"


def _is_tensor(one: object) -> bool:
    if not isinstance(one, dict) or one.get("dtype") not in DTYPES or not isinstance(one.get("digest"), str):
        return False
    shape = one.get("shape")
    if not isinstance(shape, list) or not all(map(_is_count, [*shape, one.get("start"), one.get("end")])):
        return False
    return one["end"] - one["start"] == prod(shape) * DTYPES[one["dtype"]].itemsize


# -- verification -----------------------------------------------------------------------------------------------------


def verify(manifest: Manifest, files: Iterable[str] | None = None) -> None:
    """Read ``files`` (all, unless named) and compare every byte. Raises ``InputError`` that names the first damaged
    one."""
    for name in manifest.files if files is None else files:
        _verify_file(manifest.path / name, manifest.files[name])
    with explained(manifest.path, "read"):
        present = os.listdir(manifest.path)
    # Such files change what from_pretrained reads; others (a tokenizer, notes) may lie beside the checkpoint.
    foreign = sorted(name for name in present if name not in manifest.files
                     and name.endswith((".safetensors", ".index.json", ".bin")))
    if foreign:
        raise InputError(f"{manifest.path / foreign[0]} is not of this checkpoint: the manifest does not list it; move "
                         "it elsewhere")


def sizes_fit(manifest: Manifest) -> bool:
    """Whether all files are there with their sizes; nothing is read."""
    try:
        return all(os.lstat(manifest.path / name).st_size == entry["bytes"] for name, entry in manifest.files.items())
    except OSError:
        return False


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    with os.fdopen(open_regular(path), "rb", buffering=0) as file, explained(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise InputError(f"{path} is damaged: it has {size:,} bytes, {entry['bytes']:,} were saved; {_AGAIN}")
        tensors = entry.get("tensors")
        if tensors is None:
            _compare(file.read, size, entry["digest"], path, "its content")
            return
        parts = sorted(tensors.items(), key=lambda item: (item[1]["start"], item[1]["end"]))
        data_bytes = max((one["end"] for _, one in parts), default=0)
        header = TensorFile(tuple(Entry(name, one["dtype"], tuple(one["shape"]), one["start"], one["end"])
                                  for name, one in parts)).header()
        if len(header) + data_bytes != size or hashlib.sha256(header).hexdigest() != entry["header"]:
            raise InputError(f"{path}: {size:,} bytes and its header are not those of the {len(parts)} tensors that "
                             f"the manifest lists; {_AGAIN}")
        _compare(file.read, size - data_bytes, entry["header"], path, "the header")
        place = 0
        for name, one in parts:
            if one["start"] != place:
                raise InputError(f"{path}: {name} begins at byte {one['start']:,} where {place:,} is due; {_AGAIN}")
            _compare(file.read, one["end"] - place, one["digest"], path, name)
            place = one["end"]


def _compare(read: Callable[[int], bytes], size: int, digest: str, path: Path, what: str) -> None:
    hashed = hashlib.sha256()
    while size:
        piece = read(min(size, CHUNK_BYTES))
        if not piece:
            raise InputError(f"{path} is damaged: {size:,} bytes are missing in {what}; {_AGAIN}")
        hashed.update(piece)
        size -= len(piece)
    if hashed.hexdigest() != digest:
        raise InputError(f"{path} is damaged: {what} has digest {hashed.hexdigest()[:12]}, {digest[:12]} was saved; "
                         f"{_AGAIN}")


def digest_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a small file: ``bytes`` and ``digest``."""
    text = read_small(path, MOST_JSON_BYTES)
    return {"bytes": len(text), "digest": hashlib.sha256(text).hexdigest()}
