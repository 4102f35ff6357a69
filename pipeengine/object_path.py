"""Python objects named in text: ``package.module:name`` or ``path/to/file.py:name``."""
from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from pipeengine.errors import InputError


def named(text: str, what: str = "object") -> object:
    """The object that ``text`` stands for; ``what`` it is to be, for the error."""
    place, colon, name = text.rpartition(":")
    if not colon:
        raise InputError(f"{text!r} names no {what}; give package.module:name or path/to/file.py:name")
    module = _module(place)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{place} has no {name!r}; it has {', '.join(known[:8])}")
    return getattr(module, name)


def _module(place: str) -> object:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except (ImportError, FileNotFoundError) as error:
        raise InputError(f"cannot import {place}: {error}") from error
