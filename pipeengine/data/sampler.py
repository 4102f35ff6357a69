"""Which samples a training loop takes, in which order: one order for any number of replicas, resumed by one integer."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized

import numpy
from torch.utils.data import Sampler

from pipeengine.data.permutation import Permutation
from pipeengine.errors import InputError
from pipeengine.rng import mix

_ROWS_AT_ONCE = 1024


class ShuffledSampler(Sampler[int]):
    """A shuffled order over map-style data of any size: pass it as ``sampler=`` to ``torch.utils.data.DataLoader``.

    - ``data``: the data set, or its number of samples.
    - ``batch_size``: rows that one replica takes at once, the ``batch_size`` of its loader; needed with several
      replicas only.
    - ``num_replicas`` (1), ``replica`` (0): of pipelines that share the data, and which one this is. Of every global
      batch of ``num_replicas * batch_size`` rows, replica 0 takes the first rows, replica 1 the next: side by side they
      are the batch that one process would take.
    - ``shuffle`` (True), ``seed`` (0): the order; each epoch has its own.
    - ``drop_last`` (False): whether a last, short global batch is left out. If not, its rows are dealt out evenly; only
      when there are fewer rows than replicas they are left out.

    The order is a function of (seed, epoch, position), so that 10**9 samples need no list and any position is reached
    at once. A pass begins at ``position``, which ``load_state_dict``, ``set_epoch`` and the end of a pass move; a
    pass that was left early begins again there. Behind a loader that fetches ahead, ``state_dict()`` is ahead of the
    training loop: wrap that loader in ``ResumableLoader``. Raises ``InputError`` for numbers that cannot be.
    """

    def __init__(self, data: Sized | int, *, batch_size: int | None = None, num_replicas: int = 1, replica: int = 0,
                 shuffle: bool = True, seed: int = 0, drop_last: bool = False):
        self.size = data if isinstance(data, int) else len(data)
        if self.size < 1:
            raise InputError(f"the data has {self.size} samples; give at least 1")
        if not 0 <= replica < num_replicas:
            raise InputError(f"replica is {replica} of {num_replicas}; give a number from 0 to {num_replicas - 1}")
        if batch_size is None and num_replicas > 1:
            raise InputError(f"{num_replicas} replicas share the data by batches, and batch_size is None; pass the "
                             "batch_size of the loader")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give a number of at least 1")
        self.batch_size, self.num_replicas, self.replica = batch_size, num_replicas, replica
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self._global_rows = num_replicas * (batch_size or 1)
        if self._rows_per_epoch() < 1:
            raise InputError(f"the data has {self.size} samples, a global batch takes {self._global_rows}; give "
                             "smaller batches, or drop_last=False")
        self._start = self._handed_out = 0
        self._has_rolled_on = False

    def __repr__(self) -> str:
        return (f"<ShuffledSampler of {self.size} samples, seed {self.seed}, replica {self.replica} of "
                f"{self.num_replicas}, {self._start} taken>")

    # -- the order --------------------------------------------------------------------------------------------------

    def order(self, start: int, stop: int) -> list[int]:
        """Samples at the positions ``start`` to ``stop`` (not included) of the endless global order of all epochs."""
        samples: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.size)
            end = min(self.size, first + stop - start)
            places = numpy.arange(first, end)
            order = Permutation(self.size, mix(self.seed, epoch))(places) if self.shuffle else places
            samples += order.tolist()
            start += end - first
        return samples

    def __iter__(self) -> Iterator[int]:
        begin = self._handed_out = self._start
        last = self._epoch_end(begin) - self.size + self._rows_per_epoch()
        stride = max(1, _ROWS_AT_ONCE // self._global_rows) * self._global_rows
        for chunk in range(begin, last, stride):
            samples = self.order(chunk, min(chunk + stride, last))
            for first in range(0, len(samples), self._global_rows):
                rows = samples[first:first + self._global_rows]
                share = self._share(len(rows))
                yield from rows[share.start:share.stop - 1]
                self._handed_out = self._settled(chunk + first + len(rows))
                yield rows[share.stop - 1]
        self._start = self._handed_out = self._epoch_end(begin)
        self._has_rolled_on = True

    def __len__(self) -> int:
        """Samples that this replica takes in an epoch."""
        whole, rest = divmod(self._rows_per_epoch(), self._global_rows)
        return whole * (self._global_rows // self.num_replicas) + len(self._share(rest))

    def _share(self, rows: int) -> range:
        """The own rows of a global batch of ``rows``, as ``tensor_split`` deals them."""
        each, more = divmod(rows, self.num_replicas)
        start = self.replica * each + min(self.replica, more)
        return range(start, start + each + (self.replica < more))

    def _rows_per_epoch(self) -> int:
        """Samples of an epoch that some replica takes."""
        rest = self.size % self._global_rows
        return self.size - (rest if self.drop_last or rest < self.num_replicas else 0)

    def _epoch_end(self, position: int) -> int:
        return (position // self.size + 1) * self.size

    def _settled(self, position: int) -> int:
        """``position``, or where the next epoch begins if nothing more is taken from this one."""
        taken = position % self.size
        rest = self._rows_per_epoch() - taken
        return position if taken == 0 or rest > 0 else self._epoch_end(position)

    # -- where it stands --------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Where a pass begins: samples of the global order, over all epochs and replicas, that were taken before."""
        return self._start

    @property
    def epoch(self) -> int:
        """The epoch in which a pass begins."""
        return self._start // self.size

    def position_after(self, start: int, num_batches: int, batch_size: int) -> int:
        """Where the order stands when every replica has taken ``num_batches`` of ``batch_size`` rows from ``start``."""
        return self._settled(min(start + num_batches * batch_size * self.num_replicas, self._epoch_end(start)))

    def state_dict(self) -> dict[str, int]:
        """One integer: samples of the global order that have been handed out."""
        return {"position": self._handed_out}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the next pass after as many samples as ``state`` says; takes no time. Raises ``InputError``."""
        position = state.get("position")
        if set(state) != {"position"} or not isinstance(position, int) or position < 0:
            raise InputError(f"{dict(state)} is not the state of a ShuffledSampler; give what state_dict() returned, "
                             "such as {'position': 0}")
        self._start = self._handed_out = self._settled(position)
        self._has_rolled_on = False

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass with the first sample of ``epoch``, unless it begins within that epoch already."""
        if epoch != self.epoch:
            self.load_state_dict({"position": epoch * self.size})

    def rewind(self, position: int) -> None:
        """Begin again at ``position`` if the last pass was fetched to its end, though nobody has seen that end."""
        if self._has_rolled_on:
            self.load_state_dict({"position": position})
