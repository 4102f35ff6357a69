"""What a checkpoint costs the training loop: seconds held per save beside one copy of the shard, and steps meanwhile.

    python benchmarks/checkpoints.py [--megabytes 400] [--saves 5]
    torchrun --standalone --nproc_per_node 2 benchmarks/checkpoints.py

A stack of linear layers under AdamW; the shard is what one worker saves, parameters and moments. ``copy`` copies the
same tensors into memory that is there already, as one flat buffer. Saves and copies take turns. Of seconds by the clock
the minimum counts, since other load on the machine cannot lower it; seconds of the loop's thread (``cpu``) are without
what others take from it, and without its waits for other workers. The first save comes after steps with none due, in
which its memory is prepared. Steps are timed while a save is being written and before it, in turns too: the median of
the ratios is told.
"""
import argparse
import json
import shutil
import threading
from collections.abc import Callable
from statistics import mean, median
from time import perf_counter, thread_time

import torch
import torch.distributed as dist
from torch import nn

import pipeengine as pe

WIDTH, ROWS = 1024, 16


def timed(what: Callable[[], object]) -> float:
    """Seconds that ``what()`` takes."""
    start = perf_counter()
    what()
    return perf_counter() - start


def timed_twice(what: Callable[[], object]) -> tuple[float, float]:
    """Seconds that ``what()`` takes by the clock and of this thread."""
    start = thread_time()
    seconds = timed(what)
    return seconds, thread_time() - start


def tensors_of(pipe: pe.Pipeline, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What one worker saves."""
    tensors = [parameter.detach() for parameter in pipe.parameters()]
    return tensors + [value for state in optimizer.state.values() for value in state.values()]


def copier(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Copies ``tensors`` into one buffer that is there already."""
    buffer = torch.zeros(sum(tensor.numel() for tensor in tensors))
    places, place = [], 0
    for tensor in tensors:
        places.append(buffer[place:place + tensor.numel()].view(tensor.shape))
        place += tensor.numel()

    def copy() -> None:
        for target, tensor in zip(places, tensors):
            target.copy_(tensor)
    return copy


def somebody(own: bool) -> bool:
    """Whether it is so on any worker: all make the same number of steps."""
    flag = torch.tensor(int(own))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def measure(megabytes: int, saves: int, folder: str) -> dict[str, float]:
    """Seconds and ratios, by name."""
    torch.manual_seed(0)            # the same batch on every worker
    layers = max(2, megabytes * 1_000_000 // (WIDTH * WIDTH * 4 * 3))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    inputs = torch.randn(ROWS, WIDTH)
    pipe = pe.Pipeline(model, (inputs,), num_microbatches=2, num_stages=None if layers > 2 else 2, costs="analytic",
                       loss_fn=nn.functional.mse_loss, target=inputs)
    optimizer = torch.optim.AdamW(pipe.parameters())

    def step() -> None:
        pipe.step(inputs, target=inputs)
        optimizer.step()
        optimizer.zero_grad()
    step()
    tensors = tensors_of(pipe, optimizer)
    copy = copier(tensors)
    checkpoints = pe.Checkpoints(folder, pipe, every=1_000_000, keep=1, optimizer=optimizer)
    checkpoints.save(1)                                             # not due
    while somebody(any(thread.name == "pipeengine-buffer" for thread in threading.enumerate())):
        step()
    held, copied, written, ratios, idle = [], [], [], [], []
    for number in range(2, saves + 3):
        copied.append(timed_twice(copy))
        idle.append(mean(timed(step) for _ in range(5)))
        held.append(timed_twice(lambda: checkpoints.save(number, force=True)))
        start, busy = perf_counter(), []
        while somebody(checkpoints.is_writing):
            busy.append(timed(step))
        checkpoints.wait()
        written.append(perf_counter() - start)
        if busy:
            ratios.append(mean(busy) / idle[-1])
    (first, first_cpu), *held = held
    (held_min, held_cpu), (copy_min, copy_cpu) = map(min, zip(*held)), map(min, zip(*copied))
    return {"shard_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "first_over_copy": first / copy_min, "first_over_copy_cpu": first_cpu / copy_cpu,
            "held": held_min, "copy": copy_min, "held_over_copy": held_min / copy_min,
            "held_over_copy_median": median(h / c for (h, _), (c, _) in zip(held, copied[1:])),
            "held_over_copy_cpu": held_cpu / copy_cpu,
            "written": min(written), "step": median(idle), "slower": median(ratios) - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="of parameters and moments, all workers together")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", default="checkpoints-benchmark", help="where to write; it is removed at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        figures = measure(options.megabytes, options.saves, options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
