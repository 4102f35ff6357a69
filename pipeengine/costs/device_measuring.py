"""What the device at hand reaches: one matrix product and one copy, timed. Operations and bytes per second."""
from __future__ import annotations

from time import perf_counter

import torch

from pipeengine.device_cards import DeviceCard

_REPEATS = 7
_COPY_BYTES = 256 * 2 ** 20
_SIDES = {"cpu": 1024}       # of the square matrices; elsewhere they must be large to fill the device
_SIDE = 8192


def measure_device(device: torch.device | str | None = None) -> DeviceCard:
    """A card of ``device`` (default: the accelerator, else the CPU with the threads torch uses now).

    Achieved rates are the best of several runs; the peaks, which no program can measure, are set to the same. Links are
    left out: they are between machines.
    """
    where = torch.device(device) if device is not None else (
        torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    flops = {kind: _matrix_rate(where, dtype) for kind, dtype in (("bfloat16", torch.bfloat16),
                                                                  ("float32", torch.float32))}
    rate, called = _copy_rate(where), _name(where)
    source = f"measured on {called} with torch {torch.__version__}; peaks unknown, set to the achieved rates"
    return DeviceCard(called, flops, dict(flops), rate, rate, _memory(where), operation_seconds=_start_seconds(where),
                      measured=True, source=source)


def _best_seconds(device: torch.device, work: object) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        _synchronize(device)
        start = perf_counter()
        work()                              # type: ignore[operator]
        _synchronize(device)
        best = min(best, perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDES.get(device.type, _SIDE)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * side ** 3 / _best_seconds(device, lambda: a @ b)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * _COPY_BYTES / _best_seconds(device, lambda: target.copy_(source))


def _start_seconds(device: torch.device) -> float:
    small, count = torch.zeros(8, device=device), 200

    def many() -> None:
        for _ in range(count):
            small.add_(1.0)
    return _best_seconds(device, many) / count


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu with {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def _memory(device: torch.device) -> float:
    """Bytes of the device; of the machine, for a CPU."""
    if device.type != "cpu":
        return float(torch.get_device_module(device).mem_get_info(device)[1])
    with open("/proc/meminfo", encoding="ascii") as file:
        return 1024.0 * int(file.readline().split()[1])
