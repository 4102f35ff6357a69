"""Damaged and hostile checkpoint folders: one error that names the file, and nothing outside the folder is read."""
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeengine.checkpoint.hugging_face import INDEX, SINGLE
from pipeengine.checkpoint.weights import load_stage
from pipeengine.errors import InputError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
VALUES = {"0.weight": torch.full((3, 3), 2.0), "0.bias": torch.full((3,), 3.0),
          "1.weight": torch.full((2, 3), 4.0), "1.bias": torch.full((2,), 5.0)}


def _write(folder: Path) -> None:
    folder.mkdir()
    for number, shard in enumerate(SHARDS):
        save_file({name: value for name, value in VALUES.items() if name[0] == str(number)}, folder / shard)
    files = {name: SHARDS[int(name[0])] for name in VALUES}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def _load(folder: Path) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    load_stage(model, set(VALUES), torch.device("cpu"), weights=folder, seed=0)
    return model


def _index(text: str | bytes) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / INDEX).write_bytes(text.encode() if isinstance(text, str) else text)
        return INDEX
    return damage


def _mapped(file: object) -> Callable[[Path], str]:
    """The first tensor is said to lie somewhere else."""
    def damage(folder: Path) -> str:
        files = {name: SHARDS[int(name[0])] for name in VALUES} | {"0.weight": file}
        (folder / INDEX).write_text(json.dumps({"weight_map": files}))
        return INDEX
    return damage


def _shard(change: Callable[[Path], object]) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        change(folder / SHARDS[1])
        return SHARDS[1]
    return damage


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _with(**values: torch.Tensor) -> Callable[[Path], object]:
    good = {"1.weight": VALUES["1.weight"], "1.bias": VALUES["1.bias"]}
    return lambda path: save_file({**good, **{name.replace("_", "."): value for name, value in values.items()}}, path)


DAMAGES: dict[str, Callable[[Path], str]] = {
    "index empty": _index(""),
    "index cut off": _index('{"weight_map": {"0.wei'),
    "index a list": _index("[1, 2]"),
    "index a number": _index("7"),
    "index without map": _index('{"metadata": {}}'),
    "index map empty": _index('{"weight_map": {}}'),
    "index map a list": _index('{"weight_map": ["a"]}'),
    "index not text": _index(b"\xff\xfe\x00\x80"),
    "index nested for ever": _index("[" * 100_000),
    "file a number": _mapped(3),
    "file null": _mapped(None),
    "file a list": _mapped([SHARDS[0]]),
    "file empty": _mapped(""),
    "file above": _mapped("../outside.safetensors"),
    "file absolute": _mapped("/etc/passwd"),
    "file deeper": _mapped("sub/model.safetensors"),
    "file the folder": _mapped("."),
    "shard missing": _shard(Path.unlink),
    "shard empty": _shard(lambda path: path.write_bytes(b"")),
    "shard four bytes": _shard(lambda path: path.write_bytes(b"abcd")),
    "shard cut in header": _shard(lambda path: path.write_bytes(path.read_bytes()[:40])),
    "shard cut in data": _shard(lambda path: path.write_bytes(path.read_bytes()[:-4])),
    "shard a pickle": _shard(lambda path: torch.save(VALUES, path)),
    "shard a text": _shard(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    "shard a folder": _shard(_as_folder),
    "shard a pipe": _shard(_as_pipe),
    "header lies": _shard(lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")),
    "header no json": _shard(lambda path: path.write_bytes(struct.pack("<Q", 4) + b"nope")),
    "header of another shard": _shard(lambda path: path.write_bytes((path.parent / SHARDS[0]).read_bytes())),
    "integers for floats": _shard(_with(**{"1_bias": torch.ones(2, dtype=torch.int64)})),
    "complex for floats": _shard(_with(**{"1_bias": torch.ones(2, dtype=torch.complex64)})),
    "flags for floats": _shard(_with(**{"1_bias": torch.ones(2, dtype=torch.bool)})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_error_that_names_the_file(name, tmp_path):
    _write(tmp_path / "good")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "good" / SHARDS[0]).read_bytes())
    file = DAMAGES[name](tmp_path / "good")
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        _load(tmp_path / "good")


@pytest.mark.parametrize("what", ["not there", "a file", "empty"])
def test_what_is_no_checkpoint_folder(what, tmp_path):
    folder = tmp_path / "nothing"
    if what == "a file":
        folder.write_text("hello")
    elif what == "empty":
        folder.mkdir()
    with pytest.raises(InputError, match="nothing"):
        _load(folder)


def test_whole_folders_load(tmp_path):
    """Sharded, in one file, and in half precision."""
    _write(tmp_path / "good")
    for folder in ("good", "single", "half"):
        if folder != "good":
            (tmp_path / folder).mkdir()
            values = {name: value.half() if folder == "half" else value for name, value in VALUES.items()}
            save_file(values, tmp_path / folder / SINGLE)
        model = _load(tmp_path / folder)
        assert all(torch.equal(value, VALUES[name]) for name, value in model.state_dict().items())
