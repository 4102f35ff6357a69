"""A kill at every call of the operating system that changes the disk, in a forked process."""
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

KILLED, FAILED = 77, 78
_CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "close")


def die_at(number: int) -> None:
    """From now on this process dies at the ``number``-th call: before it, or for a write in its middle."""
    calls = [0]

    def wrap(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                if name == "write":
                    real(args[0], args[1][:len(args[1]) // 2])
                os._exit(KILLED)
            return real(*args, **kwargs)
        return call
    for name in _CALLS:
        setattr(os, name, wrap(name))


def in_fork(what: Callable[[], object]) -> int:
    """The exit status of a forked process that does ``what``: 0, ``KILLED`` or ``FAILED``."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            what()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every_kill(what: Callable[[], object], before: Path, folder: Path, look: Callable[[int], None]) -> int:
    """Kill ``what``, which changes ``folder``, at each of its calls in turn; ``folder`` is a copy of ``before`` each
    time. ``look`` is called with the number of the call after each kill. Returns how many kills there were."""
    number = 0
    while True:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

        def killed() -> None:
            die_at(number)
            what()
        status = in_fork(killed)
        assert status in (0, KILLED), status
        look(number)
        if status == 0:
            return number - 1
