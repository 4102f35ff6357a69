"""The host memory that saves in the background copy tensors into: one piece, used again by every save."""
from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch

from pipeengine.checkpoint.background import start_beside_training
from pipeengine.checkpoint.tensor_file import CHUNK_BYTES, DTYPES, Source, TensorFile, bytes_of

ALIGNMENT_BYTES = 64
_TOUCH_BYTES = 1 << 22          # what a copy may have to wait for while memory is prepared
_preparing: weakref.WeakSet[HostBuffer] = weakref.WeakSet()


class HostBuffer:
    """One piece of host memory that every save copies its tensors into, made larger when it must be, never twice."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._preparing: threading.Thread | None = None
        self._enough = threading.Event()

    def prepare(self, num_bytes: int, pinned: bool) -> None:
        """Have that much memory before the first copy needs it: the system hands its pages out at a fraction of the
        speed of a copy, on a thread of its own. To be called once, before any copy."""
        def touch() -> None:
            with contextlib.suppress(RuntimeError):     # no memory left: the copy will say so, on the thread that can
                self._make(num_bytes, pinned)
            for at in range(0, len(self._memory), _TOUCH_BYTES):
                if self._enough.is_set():
                    return
                self._memory[at:at + _TOUCH_BYTES].zero_()
        self._preparing = start_beside_training("pipeengine-buffer", touch)
        _preparing.add(self)

    def copy(self, files: Sequence[tuple[TensorFile, Mapping[str, torch.Tensor]]]) -> list[Source]:
        """Copy the tensors of all ``files``; where each file's bytes are now. The sources hold until the next call."""
        self.stop_preparing()
        places = [0]
        for file, _ in files:
            places.append(places[-1] + padded(file.data_bytes))
        accelerator = next((t.device.type for _, tensors in files for t in tensors.values() if t.device.type != "cpu"),
                           None)
        if self._memory.numel() < places[-1]:
            self._make(places[-1], accelerator == "cuda")
        sections = [self._memory[place:place + file.data_bytes] for place, (file, _) in zip(places, files)]
        with torch.no_grad():
            for section, (file, tensors) in zip(sections, files):
                for entry in file.entries:
                    target = section[entry.start:entry.end].view(DTYPES[entry.dtype]).view(entry.shape)
                    target.copy_(tensors[entry.name].detach(), non_blocking=True)
        if accelerator is not None:
            torch.accelerator.synchronize()
        return [_sections(file, section) for section, (file, _) in zip(sections, files)]

    def _make(self, num_bytes: int, pinned: bool) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)        # the old one goes before the new one comes
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def stop_preparing(self) -> None:
        """Nothing is touched any more: tensors are copied there, or the process ends."""
        if self._preparing is not None:
            self._enough.set()
            self._preparing.join()
            self._preparing = None


@atexit.register
def _stop_all() -> None:
    """A thread that comes back from C++ when the interpreter is gone already aborts the process."""
    for buffer in list(_preparing):
        buffer.stop_preparing()


def padded(num_bytes: int) -> int:
    """The room that a file of so many bytes takes in a buffer."""
    return num_bytes + -num_bytes % ALIGNMENT_BYTES


def _sections(file: TensorFile, section: torch.Tensor) -> Source:
    for entry in file.entries:
        yield entry, (bytes_of(section[at:min(at + CHUNK_BYTES, entry.end)])
                      for at in range(entry.start, entry.end, CHUNK_BYTES))
