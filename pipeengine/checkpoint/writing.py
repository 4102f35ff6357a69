"""One save on its way to the disk: each worker writes its own part, worker 0 closes it.

Everything goes into a hidden folder: each worker's files, flushed, then its record (``worker-00001.json``: digests and
the JSON of its parts). Once all records are there worker 0 writes the small files and the manifest, flushes the folder,
gives it its name and prunes. Nothing here talks to another worker: the folder is what they share. So a save in the
background meets no message of a step, and a script that ends while it is written still has its checkpoint.
"""
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeengine.checkpoint import disk
from pipeengine.checkpoint.background import start_beside_training
from pipeengine.checkpoint.collecting import Closing, index_text
from pipeengine.checkpoint.hugging_face import INDEX
from pipeengine.checkpoint.manifest import MANIFEST, MOST_JSON_BYTES, STATE, digest_of, manifest_text, parse_json
from pipeengine.checkpoint.optimizer_state import merge_shares
from pipeengine.checkpoint.step_folders import prune, publish, remove_leftovers, saving_name, step_name
from pipeengine.checkpoint.tensor_file import Source, TensorFile, write_tensors
from pipeengine.errors import InputError

_POLL_SECONDS = 0.01
_FOLDER_SECONDS = 60.0          # what a shared file system may take to show a folder that worker 0 has made
_STILL_SECONDS = 60.0           # at exit: how long nothing may have been written before worker 0 gives a save up
_underway: set[Path] = set()    # that this process writes in: a pipeline made anew may save beside a forgotten one


@dataclass(frozen=True)
class Task:
    """What one worker is to write. ``closing`` is worker 0's, None elsewhere; ``damaged`` are checkpoints that count
    for nothing when old ones are pruned."""

    folder: Path
    step: int
    attempt: str
    rank: int
    size: int
    files: Sequence[tuple[str, TensorFile, Source]]
    parts: Mapping[str, Any]
    closing: Closing | None
    keep: int | None
    damaged: frozenset[str]

    @property
    def path(self) -> Path:
        """The folder that is written."""
        return self.folder / saving_name(self.step, self.attempt)


def make_room(folder: Path, step: int, attempt: str) -> None:
    """Worker 0, before anybody writes: the folder that a save is written in."""
    disk.make_folder(folder)
    _underway.add(folder / saving_name(step, attempt))
    disk.make_folder(folder / saving_name(step, attempt), lasting=False)


class Writing:
    """A task that is carried out, here or on a thread of its own; a problem is raised by whoever waits for it."""

    def __init__(self, task: Task):
        self._task = task
        self._written, self._done, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._removing = threading.Lock()
        self._leaving = False
        self._problem: BaseException | None = None

    def start(self, background: bool) -> None:
        """Begin. Without ``background`` the own part is written when this returns; worker 0 closes in ``finish``."""
        if background:
            self._thread = start_beside_training("pipeengine-save", self._run)
        else:
            self._write()

    def _run(self) -> None:
        self._write()
        self._close()

    def _write(self) -> None:
        try:
            write_part(self._task)
        except BaseException as error:          # told to whoever waits, on the thread that can act on it
            self._problem = error
        self._written.set()

    def _close(self) -> None:
        try:
            if self._task.closing is not None and self._problem is None and not self._cancelled.is_set():
                close(self._task, self._await_records())
        except BaseException as error:
            self._problem = self._problem or error
        self._done.set()
        _underway.discard(self._task.path)
        self._remove()

    def _remove(self) -> None:
        """Worker 0: remove what has been written, once all workers know that this save is given up.

        Not sooner: one that has yet to begin would wait for a folder that is gone.
        """
        with self._removing:
            if self._task.closing is not None and self._done.is_set() and self._cancelled.is_set():
                disk.remove_quietly(self._task.path)

    def _await_records(self) -> list[dict[str, Any]]:
        """Every worker's record, once all are there."""
        waiting, last, since = list(range(self._task.size)), -1, time.monotonic()
        while waiting := [rank for rank in waiting if not _record_path(self._task.path, rank).exists()]:
            if self._cancelled.wait(_POLL_SECONDS):
                raise InputError(f"the save of step {self._task.step} was given up")
            written = _written_bytes(self._task.path)
            if written != last:
                last, since = written, time.monotonic()
            elif self._leaving and time.monotonic() - since > _STILL_SECONDS:
                raise InputError(f"the save of step {self._task.step} was given up: nothing came from worker "
                                 f"{waiting[0]} for {_STILL_SECONDS:.0f} seconds")
        return [_read_record(self._task.path, rank) for rank in range(self._task.size)]

    def finish_writing(self) -> None:
        """Wait until the own part is on the disk. Raises what went wrong."""
        self._written.wait()
        self._raise()

    def finish(self) -> None:
        """Worker 0: wait until the checkpoint has its name; all workers' parts must be on the disk."""
        if self._task.closing is None:
            return
        if self._thread is None and not self._done.is_set():
            self._close()
        self._done.wait()
        self._raise()

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    @property
    def is_done(self) -> bool:
        """Whether this worker has nothing left to do for it."""
        return self._written.is_set() and (self._task.closing is None or self._done.is_set())

    def cancel(self) -> None:
        """Give it up, as every worker does: worker 0 removes what has been written."""
        self._cancelled.set()
        if self._thread is None and not self._done.is_set():
            self._close()
        else:
            self._remove()

    def leave(self) -> None:
        """Wait for the own part, and on worker 0 for the others', as a process ends. Raises what went wrong.

        Where worker 0 cannot write its own part the others' stay, since nobody knows how far they are: the next save
        removes them.
        """
        self._leaving = True
        self.finish_writing()
        try:
            self.finish()
        except BaseException:
            self.cancel()
            raise


def write_part(task: Task) -> None:
    """This worker's files and its record, on the disk when this returns. Raises ``InputError`` for what fails."""
    try:
        _await_folder(task)
        files = {name: write_tensors(task.path / name, file, source) for name, file, source in task.files}
        text = json.dumps({"files": files, "parts": task.parts}).encode()
        record = _record_path(task.path, task.rank)
        disk.write_file(record.with_suffix(".part"), [text])
        disk.replace_file(record.with_suffix(".part"), record)
    except InputError:
        for name, _, _ in task.files:           # a full disk has room again
            disk.remove_quietly(task.path / name)
        raise


def _await_folder(task: Task) -> None:
    limit = time.monotonic() + _FOLDER_SECONDS
    while not task.path.is_dir():
        if time.monotonic() > limit:
            raise InputError(f"worker {task.rank} does not see {task.path}, which worker 0 has made; give a folder "
                             "that all workers share")
        time.sleep(_POLL_SECONDS)


def close(task: Task, records: Sequence[Mapping[str, Any]]) -> None:
    """Worker 0: what belongs to no worker, the manifest, the name; then what is older goes."""
    assert task.closing is not None
    files = {name: entry for record in records for name, entry in record["files"].items()}
    models = {name: entry for name, entry in files.items() if name.startswith("model")}
    texts = {**task.closing.texts, STATE: _state_text(task.closing, records)}
    if len(models) > 1:
        texts[INDEX] = index_text(models)
    for name, text in texts.items():
        disk.write_file(task.path / name, [text])
        files[name] = digest_of(task.path / name)
    for rank in range(task.size):
        disk.remove_file(_record_path(task.path, rank))
    disk.write_file(task.path / MANIFEST, [manifest_text(task.closing.facts, files)])
    disk.sync_folder(task.path)
    publish(task.path, task.step, task.attempt)
    remove_leftovers(task.folder, _underway)
    if task.keep is not None:
        prune(task.folder, task.keep, step_name(task.step), task.damaged)


def _state_text(closing: Closing, records: Sequence[Mapping[str, Any]]) -> bytes:
    parts: dict[str, object] = {}
    for name, alike in closing.alike.items():
        own = [record["parts"][name] for record in records]
        if name in closing.optimizers:
            parts[name] = {"optimizer": merge_shares(own)}
        else:
            parts[name] = {"states": own[:1] if alike else own}
    return (json.dumps({"pipeline": closing.counters, "parts": parts}, allow_nan=False) + "\n").encode()


def _record_path(folder: Path, rank: int) -> Path:
    return folder / f"worker-{rank + 1:05}.json"


def _read_record(folder: Path, rank: int) -> dict[str, Any]:
    path = _record_path(folder, rank)
    return parse_json(disk.read_small(path, MOST_JSON_BYTES), path)


def _written_bytes(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:
        return 0
