"""A loader that knows what the training loop has taken from it, and goes on from there after a restart."""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader

from pipeengine.data.sampler import ShuffledSampler
from pipeengine.errors import InputError


class ResumableLoader:
    """Batches of ``loader``, with a ``state_dict`` of what has been handed to the training loop.

    A ``DataLoader`` fetches ahead, so that its sampler is ahead of the training loop; this counts what the loop took.
    ``loader`` is one of

    - a ``DataLoader`` over a ``ShuffledSampler``: the state is one integer, and resuming takes no time;
    - anything with ``state_dict`` and ``load_state_dict`` (``torchdata``'s ``StatefulDataLoader``, an iterable data set
      of ``datasets``), or a ``DataLoader`` without workers over such a data set: its own state is kept;
    - any other loader: what was taken before is read again and thrown away, with a warning that says so.

    Each ``for`` loop is a pass to the end of the epoch. It begins where ``load_state_dict`` or the last finished pass
    put it, so that a batch taken by ``next(iter(loader))`` as an example is not missed later. Raises ``InputError``
    for a state of another kind of loader.
    """

    def __init__(self, loader: Iterable):
        self.loader = loader
        self._place = _place_in(loader)

    def __iter__(self) -> Iterator[Any]:
        self._place.begin()
        for batch in self._place.batches():
            self._place.take()
            yield batch
        self._place.finish()

    def __len__(self) -> int:
        """Batches of a whole epoch, where the loader can tell."""
        return len(self.loader)             # type: ignore[arg-type]

    def endless(self) -> Iterator[Any]:
        """Batches of one epoch after the other, without end: ``next(batches)`` in a loop over steps."""
        while True:
            is_empty = True
            for batch in self:
                is_empty = False
                yield batch
            if is_empty and not self._place.was_resumed:
                raise InputError("the loader gives 0 batches in an epoch; give it data, or a smaller batch_size")

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass with ``epoch``; for loops that leave a pass early and want another order."""
        self._place.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What to save; the batch that the loop has in hand counts as taken."""
        return self._place.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what had been taken when ``state`` was saved."""
        self._place.load(state)


class _Place(Protocol):
    """Where the training loop stands in a loader."""

    was_resumed: bool

    def begin(self) -> None: ...
    def batches(self) -> Iterable: ...
    def take(self) -> None: ...
    def finish(self) -> None: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


def _place_in(loader: Iterable) -> _Place:
    if _has_state(loader):
        return _OwnState(loader, loader)
    if isinstance(loader, DataLoader):
        sampler = _shuffled_sampler(loader)
        if sampler is not None:
            return _SamplerPosition(loader, sampler)
        if _has_state(loader.dataset) and loader.num_workers == 0:
            return _OwnState(loader, loader.dataset)
    return _Count(loader)


def _has_state(thing: object) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _shuffled_sampler(loader: DataLoader) -> ShuffledSampler | None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, ShuffledSampler):
            return sampler
    return None


class _SamplerPosition:
    """The state is the sampler's integer, for the batches that the loop has taken."""

    def __init__(self, loader: DataLoader, sampler: ShuffledSampler):
        size = getattr(loader.batch_sampler, "batch_size", loader.batch_size) or 1
        if sampler.batch_size not in (None, size):
            raise InputError(f"the sampler deals out batches of {sampler.batch_size} rows, the loader makes batches of "
                             f"{size}; give both the same batch_size")
        self._loader, self._sampler, self._batch_size = loader, sampler, size
        self._begun, self._taken, self._is_under_way = sampler.position, 0, False
        self.was_resumed = False

    def begin(self) -> None:
        if self._is_under_way:
            self._sampler.rewind(self._begun)
        self._begun, self._taken, self._is_under_way = self._sampler.position, 0, True

    def batches(self) -> Iterable:
        return self._loader

    def take(self) -> None:
        self._taken += 1
        self.was_resumed = False

    def finish(self) -> None:
        self._is_under_way, self.was_resumed = False, False

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)
        self._is_under_way = False

    def state(self) -> dict[str, Any]:
        if not self._is_under_way:
            return {"position": self._sampler.position}
        return {"position": self._sampler.position_after(self._begun, self._taken, self._batch_size)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._sampler.load_state_dict(state)
        self._is_under_way, self.was_resumed = False, True


class _OwnState:
    """The state is that of ``keeper``, the loader or its data set."""

    def __init__(self, loader: Iterable, keeper: Any):
        self._loader, self._keeper = loader, keeper
        self._before: dict[str, Any] | None = None
        self.was_resumed = False

    def begin(self) -> None:
        pass

    def batches(self) -> Iterable:
        return self._loader

    def take(self) -> None:
        self.was_resumed = False

    def finish(self) -> None:
        self.was_resumed = False

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._keeper, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def state(self) -> dict[str, Any]:
        return self._keeper.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        self._keeper.load_state_dict(state)
        self.was_resumed = True


class _Count:
    """The state is a count of batches; a pass that resumes reads them again."""

    def __init__(self, loader: Iterable):
        self._loader = loader
        self._epoch = self._skipped = self._taken = 0
        self.was_resumed = False

    def begin(self) -> None:
        self._taken = self._skipped

    def batches(self) -> Iterable:
        if not self._skipped:
            return self._loader
        warnings.warn(
            f"{type(self._loader).__name__} cannot go to a place in its data, so {self._skipped} batches are read and "
            "thrown away; their order is the same as before only if it is shuffled from the same seed. "
            "sampler=pipeengine.ShuffledSampler(data) resumes at once", stacklevel=3)
        return islice(self._loader, self._skipped, None)

    def take(self) -> None:
        self._taken += 1
        self.was_resumed = False

    def finish(self) -> None:
        self._epoch, self._skipped, self._taken = self._epoch + 1, 0, 0
        self.was_resumed = False

    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._skipped, self._taken = epoch, 0, 0

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batches": self._taken}

    def load(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"epoch", "batches"}:
            raise InputError(f"the state has {sorted(state)}, a {type(self._loader).__name__} is counted by "
                             "['batches', 'epoch']; resume with the kind of loader that the state was saved with")
        self._epoch, self._skipped = state["epoch"], state["batches"]
        self._taken, self.was_resumed = self._skipped, True
