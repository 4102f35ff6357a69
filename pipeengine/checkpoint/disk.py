"""Every change on disk that a save makes, in a few functions: what they return from is there to stay.

Each writes with plain calls of the operating system (open, write, fsync, rename), so that a kill can be tried at every
one of them. Modes are what the user's umask leaves. An ``OSError`` becomes one ``InputError`` that names the path and
says what to do.
"""
from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeengine.errors import InputError

GATHER_BYTES = 1 << 20         # chunks up to that are copied together; a copy is cheap beside a call
_NEXT_STEP = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints, and save again",
    errno.EDQUOT: "the quota is used up; free some space and save again",
    errno.EROFS: "the file system is read-only; save to another folder",
    errno.EACCES: "allow writing there, or save to another folder",
    errno.EPERM: "allow writing there, or save to another folder",
    errno.ENOENT: "a folder on the way has vanished; is the disk mounted on every worker?",
    errno.ENOTDIR: "a file is in the place of a folder; save to another folder",
}


@contextlib.contextmanager
def explained(path: Path, what: str = "write") -> Iterator[None]:
    """An ``OSError`` inside is raised as an ``InputError`` that names ``path`` and the next step."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        following = _NEXT_STEP.get(error.errno or 0, "look at the disk and try again")
        raise InputError(f"cannot {what} {where}: {error.strerror or error}; {following}") from error


def make_folder(path: Path, lasting: bool = True) -> None:
    """A folder with all its parents; there to stay, unless it will be renamed anyway."""
    with explained(path):
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for one in missing if lasting else ():
            _sync(one.parent)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A new file of ``chunks``, one after the other, on the disk when this returns. Small ones are written together:
    after each call of the system a thread must wait for Python's lock, and then the training loop for the thread."""
    with explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in _gathered(chunks):
                rest = memoryview(chunk).cast("B")
                while rest:
                    rest = rest[os.write(file, rest):]
            os.fsync(file)
        finally:
            os.close(file)


def _gathered(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    """The same bytes, small chunks joined."""
    small = bytearray()
    for chunk in chunks:
        if small and len(small) + memoryview(chunk).nbytes > GATHER_BYTES:
            yield small
            small = bytearray()
        if memoryview(chunk).nbytes > GATHER_BYTES:
            yield chunk
        else:
            small += chunk
    if small:
        yield small


def sync_folder(path: Path) -> None:
    """What was made, renamed or removed in a folder stays so when this returns."""
    with explained(path):
        _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def rename(source: Path, target: Path) -> None:
    """Give a folder its name, for good when this returns; ``target`` must be free."""
    with explained(target):
        os.rename(source, target)
        _sync(target.parent)


def replace_file(source: Path, target: Path) -> None:
    """Put a file in the place of ``target`` at once, for good when this returns."""
    with explained(target):
        os.replace(source, target)
        _sync(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with explained(path, "remove"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; it is renamed first, so that half of it never has its old name."""
    with explained(path, "remove"), contextlib.suppress(FileNotFoundError):
        if not path.name.startswith("."):
            hidden = path.with_name(f".removed-{path.name}-{uuid.uuid4().hex[:8]}")
            os.rename(path, hidden)
            path = hidden
        shutil.rmtree(path)


def remove_quietly(path: Path) -> None:
    """Remove what a failed save has left, where that works; the failure itself is what people must hear of."""
    with contextlib.suppress(InputError):
        (remove_folder if path.is_dir() else remove_file)(path)


def open_regular(path: Path) -> int:
    """A descriptor of an ordinary file, for reading. Raises ``InputError`` for links, pipes, folders and what is not
    there."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path} is a link; checkpoints hold ordinary files only: copy what it points "
                             "to") from error
        what = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        raise InputError(f"{path} {what}; copy the checkpoint again, or use another one") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise InputError(f"{path} is no ordinary file; copy the checkpoint again, or use another one")
    return file


def read_small(path: Path, most_bytes: int) -> bytes:
    """A whole file of at most ``most_bytes``. Raises ``InputError`` where it is larger or cannot be read."""
    with os.fdopen(open_regular(path), "rb") as file, explained(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise InputError(f"{path} has {size:,} bytes, at most {most_bytes:,} are read; is it of this checkpoint?")
        return file.read(most_bytes)
