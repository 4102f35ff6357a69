"""Random numbers that do not depend on how a model is cut.

Every place in the model that draws random numbers has its own stream, keyed by (seed, step, micro-batch, place). Where
a stage begins or ends, and in what order micro-batches run, then changes nothing.
"""
from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit number from several (splitmix64, Steele et al., OOPSLA 2014)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def place_number(place: str) -> int:
    """A number for a place in the model, the same in every process."""
    return zlib.crc32(place.encode()) | len(place) << 32


def generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """The generators that operators on ``device`` draw from: the CPU's and the device's own."""
    if device.type == "cpu":
        return (torch.default_generator,)
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    return torch.default_generator, module.default_generators[index]


@contextlib.contextmanager
def keyed(key: int, place: str, device: torch.device = torch.device("cpu")) -> Iterator[None]:
    """Inside, operators draw from the stream of ``place`` under ``key``; the global state is untouched."""
    own = generators(device)
    states = [generator.get_state() for generator in own]
    number = mix(key, place_number(place))
    try:
        for generator in own:
            generator.manual_seed(number)
        yield
    finally:
        for generator, state in zip(own, states):
            generator.set_state(state)



class RngStreams:
    """Sets the random numbers of each place in the model; ``None`` as key leaves the global stream alone."""

    def __init__(self, device: torch.device):
        self._generators = generators(device)
        self.key: int | None = None

    def enter(self, key: int | None) -> list[torch.Tensor] | None:
        """Use the streams of ``key`` from now on; returns what ``leave`` needs."""
        self.key = key
        return None if key is None else [generator.get_state() for generator in self._generators]

    def leave(self, states: list[torch.Tensor] | None) -> None:
        """Go back to the states that ``enter`` returned."""
        for generator, state in zip(self._generators, states or ()):
            generator.set_state(state)

    def __call__(self, place: int) -> None:
        if self.key is not None:
            number = mix(self.key, place)
            for generator in self._generators:
                generator.manual_seed(number)
