"""A run's checkpoints: saved so that none can be half, loaded by any number of workers."""
from __future__ import annotations

import atexit
import re
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

from pipeengine.checkpoint.collecting import (
    Constants,
    check_claims,
    closing,
    collect,
    expected_bytes,
    files_to_write,
    record_of,
)
from pipeengine.checkpoint.holdings import Trained
from pipeengine.checkpoint.host_buffer import HostBuffer
from pipeengine.checkpoint.manifest import read_manifest, verify
from pipeengine.checkpoint.preemption import AGAIN, DUE, STOP, SignalWatch
from pipeengine.checkpoint.restoring import prepare_restore
from pipeengine.checkpoint.step_folders import candidates, tell
from pipeengine.checkpoint.tensor_file import TensorFile, stream
from pipeengine.checkpoint.writing import Task, Writing, make_room
from pipeengine.errors import InputError

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_RESERVED = ("model", "worker")


class Checkpoints:
    """Saves and restores the training of ``pipe`` in ``folder``; every worker makes one and calls its methods alike.

    - ``every`` (None: each call of ``save``): a number of steps, or a time such as ``"10min"`` or ``"90s"``.
    - ``keep`` (3): the newest whole checkpoints that stay; None keeps all.
    - ``background`` (True): ``save`` returns once this worker's part is copied; a thread writes it. What goes wrong is
      raised by the next ``save`` that is due, or by ``wait``.
    - ``signals`` (True): from the first ``save`` on SIGTERM saves after the step and exits with 0, SIGUSR1 saves and
      goes on, unless the program has handlers of its own for them.
    - ``parts``: objects with ``state_dict`` and ``load_state_dict``. An optimizer's state goes by parameters' names, so
      any number of workers reads it; of others JSON and tensors are written, and never code.

    ``folder/step-000100/`` is a Hugging Face folder (``from_pretrained`` reads it) with the optimizer's safetensors,
    ``state.json`` and ``manifest.json`` beside it. It gets its name once it is whole and on the disk.

    Raises ``InputError`` for options of the wrong kind.
    """

    def __init__(self, folder: str | Path, pipe: Trained, *, every: int | str | None = None, keep: int | None = 3,
                 background: bool = True, signals: bool = True, **parts: Any):
        self._folder, self._pipe, self._parts = Path(folder), pipe, dict(parts)
        self._every_steps, self._every_seconds = _interval(every)
        if keep is not None and not (type(keep) is int and keep >= 1):
            raise InputError(f"keep is {keep!r}; give a number of checkpoints of at least 1, or None to keep all")
        for name, part in parts.items():
            if not name.isidentifier() or name in _RESERVED:
                raise InputError(f"a part is called {name!r}; give it a name such as optimizer, scheduler or loader")
            if not callable(getattr(part, "state_dict", None)) or not callable(getattr(part, "load_state_dict", None)):
                raise InputError(f"{name} is a {type(part).__name__} without state_dict and load_state_dict; leave it "
                                 "out, or give it both")
        self._keep, self._background = keep, background
        self._constants = Constants.of(pipe.holdings())
        self._buffer = HostBuffer()
        self._is_prepared = not background
        self._writing: Writing | None = None
        self._signals = SignalWatch(pipe.holdings().workers.wishes) if signals else None
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._passed_over: dict[str, str] = {}
        self._at_exit = atexit.register(_leave, weakref.ref(self))

    # -- save -------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Checkpoints in {self._folder} of {', '.join(['weights', *self._parts])}>"

    def save(self, step: int, force: bool = False) -> None:
        """Save as ``step`` when it is due, or in any case with ``force``; every worker calls it after every step.

        Holds the loop for one copy of this worker's tensors, and for what is left of a save that is still being
        written. Raises ``InputError``, the same on every worker, where this save or the one before could not be
        written; training and the checkpoints on the disk are as they were. After a SIGTERM it saves, waits and raises
        ``SystemExit(0)``.
        """
        if type(step) is not int or step < 0:
            raise InputError(f"step is {step!r}; give the number of steps that have been trained")
        if self._signals is not None:
            self._signals.watch()
        asked = self._asked()
        if not (force or asked & (STOP | AGAIN | DUE) or self._is_due(step)):
            self._prepare()
            return
        self._is_prepared = True
        if force or asked & (STOP | AGAIN) or step != self._last_step:
            self._guarded("Checkpoints.save", lambda: self._begin(step))
        if asked & STOP:
            self.wait()
            self._release_signals()
            raise SystemExit(0)

    def _prepare(self) -> None:
        """Once, while no save is due yet and the optimizer has its state: memory for the first one."""
        if not self._is_prepared:
            self._is_prepared = True
            self._buffer.prepare(*expected_bytes(self._pipe.holdings(), self._parts))

    def _asked(self) -> int:
        """What some worker asks for: the same on all of them at the same call."""
        workers = self._pipe.holdings().workers
        if self._every_seconds is not None and workers.rank == 0 \
                and time.monotonic() - self._last_time >= self._every_seconds:
            workers.wishes.ask(DUE)
        return workers.wishes.take(-1 if self._signals is not None else DUE, alone=workers.size == 1)

    def _is_due(self, step: int) -> bool:
        if self._every_seconds is not None:
            return False
        return self._every_steps is None or step % self._every_steps == 0

    def _begin(self, step: int) -> None:
        """Start writing a checkpoint, once all workers have finished the one before and agree on this."""
        self._settle()
        holdings = self._pipe.holdings()
        workers = holdings.workers
        share = workers.run_synchronized(lambda: collect(holdings, self._parts))
        everybody = workers.all_gather_object({**share.claims(), "step": step, "folder": str(self._folder),
                                               "attempt": uuid.uuid4().hex[:12]})
        check_claims(everybody)
        share = share.whole(holdings)
        attempt = everybody[0]["attempt"]
        tensors = files_to_write(share, everybody, workers.rank, holdings.writers)

        def prepare() -> Writing:
            files = {name: TensorFile.of(own) for name, own in tensors.items()}
            sources = self._buffer.copy([(files[name], own) for name, own in tensors.items()]) if self._background \
                else [stream(files[name], own) for name, own in tensors.items()]
            last = closing(holdings, self._parts, share, step, everybody, self._constants) \
                if workers.rank == 0 else None
            if workers.rank == 0:
                make_room(self._folder, step, attempt)
            return Writing(Task(self._folder, step, attempt, workers.rank, workers.size,
                                [(name, file, source) for (name, file), source in zip(files.items(), sources)],
                                record_of(share), last, self._keep, frozenset(self._passed_over)))
        self._writing = workers.run_synchronized(prepare)
        self._writing.start(self._background)
        self._last_step, self._last_time = step, time.monotonic()
        if not self._background:
            self._settle()

    def wait(self) -> None:
        """Return when what was saved is on the disk under its name. Raises ``InputError`` on every worker where it
        could not be written."""
        self._guarded("Checkpoints.wait", self._settle)

    def _settle(self) -> None:
        """The end of the save that is being written, if there is one."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        workers = self._pipe.holdings().workers
        try:
            workers.run_synchronized(writing.finish_writing)
            workers.run_synchronized(writing.finish)
        except BaseException:
            self._last_step = None
            writing.cancel()
            raise

    # -- load -------------------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Restore everything from the newest whole checkpoint and return its step; 0 where there is none.

        Every byte is compared with its digest. What is damaged is passed over, told on stderr, and kept in
        ``passed_over``. Raises ``InputError``, the same on every worker, where checkpoints are there and none is whole,
        or where the newest whole one is of another model or of other parts.
        """
        return int(self._guarded("Checkpoints.load", self._load))       # type: ignore[call-overload]

    @property
    def is_writing(self) -> bool:
        """Whether this worker is still at work on a save: worker 0 until it has its name."""
        return self._writing is not None and not self._writing.is_done

    @property
    def passed_over(self) -> dict[str, str]:
        """Checkpoints that ``load`` did not take, by name, and why."""
        return dict(self._passed_over)

    def _load(self) -> int:
        self._settle()
        workers = self._pipe.holdings().workers
        names = workers.broadcast_object(workers.run_synchronized(
            lambda: candidates(self._folder) if workers.rank == 0 else None)) or []
        self._passed_over = {}
        for name in names:
            problem = next(filter(None, workers.all_gather_object(self._problem_of(name))), None)
            if problem is not None:
                self._passed_over[name] = problem
                if workers.rank == 0:
                    tell(f"passing over {name}: {problem}")
                continue
            self._restore(self._folder / name)
            return self._last_step or 0
        if names:
            raise InputError(f"none of the {len(names)} checkpoints in {self._folder} is whole: "
                             f"{next(iter(self._passed_over.values()))}; copy one back, or give an empty folder to "
                             "start anew")
        return 0

    def _restore(self, path: Path) -> None:
        """Put everything back from a checkpoint that has been verified."""
        holdings = self._pipe.holdings()
        manifest = holdings.workers.run_synchronized(lambda: read_manifest(path))
        put = holdings.workers.run_synchronized(lambda: prepare_restore(holdings, self._parts, manifest))
        holdings.workers.run_synchronized(put)
        self._last_step, self._last_time = manifest.step, time.monotonic()

    def _problem_of(self, name: str) -> str | None:
        """Why a checkpoint is not whole; the workers share the reading of its files."""
        workers = self._pipe.holdings().workers
        try:
            manifest = read_manifest(self._folder / name)
            if not name.endswith(f"{manifest.step:06}") and not name.startswith("."):
                return f"{manifest.path} says that it is of step {manifest.step}; give it its name back"
            largest = sorted(manifest.files, key=lambda file: (-manifest.files[file]["bytes"], file))
            verify(manifest, largest[workers.rank::workers.size])
        except InputError as error:
            return str(error)
        return None

    def _guarded(self, call: str, what: Any) -> Any:
        """``what()`` once all workers are in the same ``call``: one that steps meanwhile is an error on all, where
        collectives of two kinds would meet and abort the process."""
        holdings = self._pipe.holdings()
        holdings.check_open()
        harmless = InputError, SystemExit
        with holdings.workers.activity.section(call, takes_long=True):
            holdings.guarded(lambda: holdings.workers.agree((), None, ()), harmless=harmless)
            return holdings.guarded(what, harmless=harmless)

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait as ``wait`` does, and give the signals back; every worker calls it. The checkpoints stay."""
        self._release_signals()
        self.wait()
        atexit.unregister(self._at_exit)

    def _release_signals(self) -> None:
        if self._signals is not None:
            self._signals.release()


def _leave(reference: weakref.ReferenceType[Checkpoints]) -> None:
    """As the process ends: a save that is being written is finished, without a word from other workers."""
    checkpoints = reference()
    writing = None if checkpoints is None else checkpoints._writing
    if checkpoints is None or writing is None or writing.is_done:
        return
    try:
        checkpoints._pipe.holdings().check_open()       # after a failure nobody must wait for the others' parts
        writing.leave()
    except Exception as error:
        tell(f"the last save was not written: {error}")


def _interval(every: int | str | None) -> tuple[int | None, float | None]:
    """(steps, seconds); at most one of them is not None."""
    if every is None or type(every) is int and every >= 1:
        return every, None      # type: ignore[return-value]
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*", every) if isinstance(every, str) else None
    if match is None or not float(match[1]):
        raise InputError(f'every is {every!r}; give a number of steps of at least 1, or a time such as '
                         '"10min" or "90s"')
    return None, float(match[1]) * _UNITS[match[2]]
