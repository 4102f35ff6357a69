"""Threads that are in C++ when a process ends: none of them aborts it, or holds it up."""
import subprocess
import sys
import time

# ``late`` comes back from C++ again and again for so many seconds, ``stuck`` never.
ENDS = """
import time
from datetime import timedelta
import torch
import torch.distributed as dist
from pipeengine.distributed import waiting

def late(*_):
    stop, square = time.perf_counter() + {seconds}, torch.randn(1000, 1000)
    while time.perf_counter() < stop:
        square @ square

def stuck(*_):
    dist.HashStore().wait(["nobody sets this"], timedelta(seconds=40))

torch.set_num_threads(1)
{action}
print("done")
"""
CLOSES = "waiting.dist.destroy_process_group = {}; waiting.give_up([object()])"
LEAVES = """
start = time.perf_counter()
try:
    waiting.Waiter(lambda: KeyboardInterrupt() if time.perf_counter() > start + 0.1 else None).run({})
except KeyboardInterrupt:
    pass
"""
IDLES = "waiter = waiting.Waiter(); waiter.run(lambda: None)"


def end(action: str, seconds: float = 0.7) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS.format(action=action, seconds=seconds)],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_what_is_left_behind_does_not_abort_the_process():
    """A group that took more than 0.2 s to close once ended a training that was through with SIGABRT."""
    end(CLOSES.format("late"))
    end(LEAVES.format("late"))


def test_nobody_waits_long_for_what_is_stuck_or_idle():
    start = time.perf_counter()
    end(CLOSES.format("stuck"))
    end(IDLES)
    assert time.perf_counter() - start < 38.0, "one of them was waited for to its end"
