"""Lower bounds that need no search."""
from __future__ import annotations

import numpy as np

from partitioners.solvers.problem import Problem


def simple_bound(problem: Problem) -> tuple[float, str]:
    """The heaviest item on its fastest device, or all work shared out perfectly, whichever is more."""
    fastest = np.min([problem.times[kind.device] for kind in problem.levels], axis=0)
    heaviest = int(fastest.argmax())
    shared = shared_work(problem)
    if fastest[heaviest] >= shared:
        return float(fastest[heaviest]), f"one item alone takes this long: {problem.items[heaviest][0]}"
    return shared, "all work shared out perfectly"


def shared_work(problem: Problem) -> float:
    """Largest load if the work could be cut anywhere: T such that all devices together do it in T."""
    counts = problem.counts or (1,) * len(problem.levels)
    reference = problem.times[problem.levels[0].device]
    same = all(np.allclose(problem.times[kind.device] * kind.device.speed, reference * problem.levels[0].device.speed)
               for kind in problem.levels)
    if same and np.isfinite(reference).all():
        work = float(reference.sum()) * problem.levels[0].device.speed
        return work / sum(count * kind.device.speed for count, kind in zip(counts, problem.levels))
    return float(np.min([problem.times[kind.device] for kind in problem.levels], axis=0).sum()) / sum(counts)
