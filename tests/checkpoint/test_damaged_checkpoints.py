"""Damaged, foreign and hostile checkpoints: passed over with a reason that names the file, or refused; never half
read."""
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import threads
import torch
from safetensors.torch import save_file

import pipeengine as pe
from pipeengine.checkpoint.manifest import MANIFEST, manifest_text

OPTIMIZER, MODEL, INDEX = ("optimizer-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                           "model.safetensors.index.json")


def parts(workers: threads.ThreadWorkers, value: float) -> tuple[threads.Fake, torch.optim.Optimizer, object]:
    fake = threads.Fake(threads.model(value), threads.owners(workers.size), workers)
    optimizer = torch.optim.SGD(fake.parameters(), lr=0.1, momentum=0.9)
    for parameter in fake.parameters() if value > 0 else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    return fake, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)


def save(folder: Path, step: int, size: int = 2) -> None:
    def work(workers):
        fake, optimizer, scheduler = parts(workers, float(step))
        fake.numbers["step"] = step
        pe.Checkpoints(folder, fake, background=False, optimizer=optimizer, scheduler=scheduler).save(step)
    threads.as_threads(size, work)


def load(folder: Path, size: int = 2) -> list[tuple[int, dict]]:
    """On every worker: the step, and what was passed over; each tensor is what was saved."""
    def work(workers):
        fake, optimizer, scheduler = parts(workers, -1.0)
        checkpoints = pe.Checkpoints(folder, fake, optimizer=optimizer, scheduler=scheduler)
        try:
            step = checkpoints.load()
        except pe.InputError:
            assert all((p == -1.0).all() and not optimizer.state[p] for p in fake.parameters()), "half of it was read"
            raise
        assert all((p == step).all() and (optimizer.state[p]["momentum_buffer"] == step).all()
                   for p in fake.parameters())
        return step, checkpoints.passed_over
    return threads.as_threads(size, work)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1)
    save(folder, 2)
    return folder


@pytest.fixture
def run(two, tmp_path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "run"))


def newest(folder: Path) -> Path:
    return folder / "step-000002"


def test_every_flipped_bit_is_noticed(run):
    """In any byte of any file; a sample of them, and each file's first and last."""
    rng = random.Random(0)
    names = sorted(os.listdir(newest(run)))
    assert {MANIFEST, "state.json", "plan.json", INDEX, OPTIMIZER, MODEL} <= set(names)
    for name in names:
        path = newest(run) / name
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(12))}:
            broken = bytearray(whole)
            broken[place] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            for step, passed in load(run, 1):
                assert step == 1 and list(passed) == ["step-000002"] and name in passed["step-000002"], (name, place)
        path.write_bytes(whole)
    assert load(run) == [(2, {})] * 2


def _rewritten(folder: Path, change: Callable[[dict], None]) -> None:
    """A manifest that says something else and is whole: as one who knows the format would write it."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    facts = {key: value for key, value in data.items() if key not in ("format", "files", "digest")}
    (folder / MANIFEST).write_bytes(manifest_text(facts, data["files"]))


def _renamed_file(new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        _rewritten(folder, lambda data: data["files"].update({new: data["files"].pop(MODEL)}))
    return damage


def _change(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name)


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)
    return damage


def _trusted(name: str, text: bytes) -> Callable[[Path], None]:
    """Another content, with the manifest made to fit."""
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(text)
        entry = {"bytes": len(text), "digest": hashlib.sha256(text).hexdigest()}
        _rewritten(folder, lambda data: data["files"].update({name: entry}))
    return damage


def _lying_header(folder: Path) -> None:
    """A header of 2^62 bytes, whose digest the manifest knows."""
    def change(data: dict) -> None:
        entry = data["files"][MODEL]
        entry |= {"bytes": 10, "header": hashlib.sha256(text).hexdigest(), "tensors": {}}
    text = struct.pack("<Q", 1 << 62) + b"{}"
    (folder / MODEL).write_bytes(text)
    _rewritten(folder, change)


def _huge_tensor(folder: Path) -> None:
    def change(data: dict) -> None:
        one = next(iter(data["files"][MODEL]["tensors"].values()))
        one |= {"shape": [1 << 40], "start": 0, "end": 1 << 42}
    _rewritten(folder, change)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "manifest missing": (MANIFEST, _change(MANIFEST, Path.unlink)),
    "manifest empty": (MANIFEST, _change(MANIFEST, lambda path: path.write_bytes(b""))),
    "manifest cut": (MANIFEST, _change(MANIFEST, lambda path: path.write_bytes(path.read_bytes()[:-9]))),
    "manifest nested": (MANIFEST, _change(MANIFEST, lambda path: path.write_text("[" * 100_000))),
    "manifest a number": (MANIFEST, _change(MANIFEST, lambda path: path.write_text("7"))),
    "manifest of a later format": (MANIFEST, _change(MANIFEST, lambda path: path.write_text('{"format": 99}'))),
    "manifest a folder": (MANIFEST, _change(MANIFEST, _replaced(Path.mkdir))),
    "manifest of another step": ("step 7", lambda folder: _rewritten(folder, lambda data: data.update(step=7))),
    "model missing": (MODEL, _change(MODEL, Path.unlink)),
    "model cut": (MODEL, _change(MODEL, lambda path: path.write_bytes(path.read_bytes()[:-4]))),
    "model longer": (MODEL, _change(MODEL, lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8))),
    "model empty": (MODEL, _change(MODEL, lambda path: path.write_bytes(b""))),
    "model a link": (MODEL, _change(MODEL, _replaced(lambda path: path.symlink_to("/etc/passwd")))),
    "model a pipe": (MODEL, _change(MODEL, _replaced(os.mkfifo))),
    "model of step 1": (MODEL, lambda folder: shutil.copy(folder.parent / "step-000001" / MODEL, folder / MODEL)),
    "model a pickle": (MODEL, _change(MODEL, lambda path: torch.save({"a": torch.ones(3)}, path))),
    "optimizer missing": (OPTIMIZER, _change(OPTIMIZER, Path.unlink)),
    "foreign weights": ("model.safetensors", lambda folder: save_file({"a": torch.ones(2)},
                                                                      folder / "model.safetensors")),
    "foreign index": ("other.index.json", _change("other.index.json", lambda path: path.write_text("{}"))),
    "foreign pickle": ("pytorch_model.bin", _change("pytorch_model.bin", lambda path: path.write_bytes(b"x"))),
    "a path that leads out": (MANIFEST, _renamed_file("../model.safetensors")),
    "an absolute path": (MANIFEST, _renamed_file("/etc/passwd")),
    "a hidden name": (MANIFEST, _renamed_file(".model.safetensors")),
    "a header that lies": (MODEL, _lying_header),
    "a tensor that lies": (MODEL, _huge_tensor),
    "folder a file": ("step-000002", lambda folder: (shutil.rmtree(folder), folder.write_text("x"))),
    "folder a link": ("step-000002", lambda folder: (folder.rename(folder.parent / "elsewhere"),
                                                     folder.symlink_to("elsewhere"))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_passed_over_and_named(name, run):
    word, damage = DAMAGES[name]
    damage(newest(run))
    reports = load(run, 1 + len(name) % 2)
    assert all(report == reports[0] for report in reports), "the same on every worker"
    step, passed = reports[0]
    assert step == 1 and list(passed) == ["step-000002"] and word in passed["step-000002"]
    assert "; " in passed["step-000002"], "and it says what to do"


def _state(state: object) -> bytes:
    """A ``state.json`` with one parameter's state."""
    optimizer = {"groups": [{"place": 0, "settings": {}}], "parameters": {"0.weight": {"group": 0, "state": state}},
                 "other": {}}
    return json.dumps({"pipeline": {"step": 2, "calls": 2}, "parts": {"optimizer": {"optimizer": optimizer}}}).encode()


HOSTILE: dict[str, tuple[str, bytes]] = {
    "state no object": ("state.json", b"[]"),
    "state empty": ("state.json", b"{}"),
    "unknown tensor": ("nothing", _state({"tensor": "nothing"})),
    "unknown kind": ("eval", _state({"eval": "1"})),
    "unknown dtype": ("load", _state({"dtype": "torch.load"})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused(name, run):
    """It is whole by its digests, so it is no damage to pass over; nothing of it is put in place."""
    word, text = HOSTILE[name]
    _trusted("state.json", text)(newest(run))
    with pytest.raises(pe.InputError, match=f"step-000002.*{word}"):
        load(run, 1)


def test_none_whole_is_an_error(run):
    """To begin anew in silence would throw the run away."""
    for name in ("step-000001", "step-000002"):
        (run / name / MODEL).unlink()
    with pytest.raises(pe.InputError, match="none of the 2 checkpoints.*whole.*empty folder"):
        load(run)
    fake = threads.as_threads(1, lambda workers: parts(workers, 1.0)[0])[0]
    assert pe.Checkpoints(run / "nothing here", fake).load() == 0


def test_a_damaged_newest_does_not_push_out_the_whole_one(run):
    """With ``keep=1``, a step 2 that was passed over counts for nothing when step 1 and the next one are looked at."""
    (newest(run) / MODEL).write_bytes(bytes(len((newest(run) / MODEL).read_bytes())))

    def work(workers):
        fake, optimizer, scheduler = parts(workers, -1.0)
        checkpoints = pe.Checkpoints(run, fake, keep=1, optimizer=optimizer, scheduler=scheduler)
        assert checkpoints.load() == 1
        with torch.no_grad():
            for parameter in fake.parameters():
                parameter.fill_(1.5)
        checkpoints.save(1, force=True)
        checkpoints.wait()
        return checkpoints.load()
    assert threads.as_threads(2, work) == [1, 1]
    assert sorted(os.listdir(run)) == ["step-000001", "step-000002"]
