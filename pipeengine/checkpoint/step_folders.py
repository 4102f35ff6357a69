"""The folders of a run's checkpoints: their names, which of them may be whole, and which may go."""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

from pipeengine.checkpoint.disk import explained, remove_folder, rename
from pipeengine.checkpoint.manifest import read_manifest, sizes_fit
from pipeengine.errors import InputError

_STEP = re.compile(r"step-(\d{6,18})")
_REPLACED = re.compile(r"\.replaced-step-(\d{6,18})-\w+")
_LEFTOVER = re.compile(r"\.(?:saving|removed|replaced)-step-\d{6,18}-\w+")


def step_name(step: int) -> str:
    """``step-000100``."""
    return f"step-{step:06}"


def saving_name(step: int, attempt: str) -> str:
    """The name of a checkpoint that is being written."""
    return f".saving-{step_name(step)}-{attempt}"


def candidates(folder: Path) -> list[str]:
    """Names of what may be checkpoints in ``folder``, the newest first.

    One that was about to be replaced by another of the same step comes after that.
    """
    named = [(int(match[1]), order, name) for name in _names(folder)
             for order, pattern in ((1, _STEP), (0, _REPLACED)) if (match := pattern.fullmatch(name))]
    return [name for _, _, name in sorted(named, reverse=True)]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}; give a folder that this user may read") from error


def publish(saved: Path, step: int, attempt: str) -> None:
    """Give a complete folder its name. One of the same step makes way first, and goes once the new one is there."""
    target = saved.with_name(step_name(step))
    if target.exists() or target.is_symlink():
        replaced = saved.with_name(f".replaced-{target.name}-{attempt}")
        rename(target, replaced)
        rename(saved, target)
        remove_folder(replaced)
    else:
        rename(saved, target)


def prune(folder: Path, keep: int, newest: str, damaged: Collection[str]) -> None:
    """Remove whole checkpoints but ``newest``, which has just been written, and the ``keep - 1`` before it.

    What is ``damaged``, or seems so, counts for nothing and stays, for people to look at.
    """
    whole = [name for name in candidates(folder) if _STEP.fullmatch(name) and name != newest and name not in damaged
             and _seems_whole(folder / name)]
    for name in whole[keep - 1:]:
        remove_folder(folder / name)


def _seems_whole(path: Path) -> bool:
    try:
        return sizes_fit(read_manifest(path))
    except InputError:
        return False


def remove_leftovers(folder: Path, underway: Collection[Path]) -> None:
    """Remove what saves of an earlier life have left half done, not those that are ``underway``; a replaced checkpoint
    stays while it is the only one of its step."""
    for name in _names(folder):
        if _LEFTOVER.fullmatch(name) and folder / name not in underway:
            match = _REPLACED.fullmatch(name)
            if match and not _seems_whole(folder / step_name(int(match[1]))):
                continue
            with explained(folder / name, "remove"):
                remove_folder(folder / name)


def tell(line: str) -> None:
    """A line for people, on stderr."""
    print(f"pipeengine: {line}", file=sys.stderr, flush=True)
