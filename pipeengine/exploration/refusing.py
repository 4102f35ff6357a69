"""Why no cut of a point can run, proved without playing one through."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from partitioners.units import format_bytes, format_share
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import Scene
from pipeengine.exploration.relaxation import Relaxation, balance

_SLACK = 1e-9
_ROUNDS = 12


@dataclass(frozen=True)
class Reason:
    """Why something does not run, for people; false where there is no reason. ``share``: of the memory that it would
    need, where memory is the reason."""

    text: str = ""
    share: float = math.inf

    def __bool__(self) -> bool:
        return bool(self.text)

    def __str__(self) -> str:
        return self.text


def lacking(scene: Scene, chain: Chain) -> Reason:
    """Why no cut can run, by counting alone, where that says it."""
    point, memory = scene.point, scene.hardware.memory
    if chain.must_hold[-1] < point.num_stages or len(chain) < point.num_stages:
        return Reason(f"{point.num_stages} stages, but the model can be cut into {len(chain)} at most")
    need = (scene.state_factor + 1) * float(chain.own_parameters[-1])
    if memory is not None and need > point.workers * memory * (1 + 1e-9):
        share = need / point.workers / memory
        return Reason(f"weights, gradients and optimizer need {format_bytes(need / point.workers)} per worker, "
                      f"{format_share(share, 0)} of the memory", share)
    return Reason() if memory is None else _pieces(scene, chain, memory)


def _pieces(scene: Scene, chain: Chain, memory: float) -> Reason:
    """Why what is never cut does not go into so many workers: of the largest pieces, a worker holds a whole number."""
    sizes = np.sort(np.diff(chain.own_parameters))[::-1] * (scene.state_factor + 1)
    sizes, workers = sizes[sizes > 0], scene.point.workers
    beside = np.floor(memory * (1 + _SLACK) / sizes)
    many = np.flatnonzero(np.arange(1, len(sizes) + 1) > workers * beside)
    if not len(many):
        return Reason()
    least = min((int(number) for number in many), key=lambda number: beside[number])
    each = -(-(least + 1) // workers)
    share = float(each * sizes[least] / memory)
    return Reason(f"{least + 1} pieces of {format_bytes(sizes[least])} or more are not cut, with gradients and "
                  f"optimizer: {each} in one worker need {format_share(share, 0)} of the memory", share)


def crowded(relaxed: Relaxation) -> tuple[Reason, int]:
    """Why no cut fits, where workers with several stages are too full together at some prices of their memory.

    The prices go half-way to those that suit the cuts so far. Also how many cuts were looked for.
    """
    if not relaxed.limits:
        return Reason(), 0
    parameters = np.stack([limit.counts[:, 3] for limit in relaxed.limits])
    weights = (parameters.sum(axis=1) >= parameters.sum(axis=1).max() * (1 - _SLACK)).astype(float)
    weights, over = weights / weights.sum(), []
    for number in range(1, _ROUNDS + 1):
        excess, cut = relaxed.least_excess(weights)
        if cut is None:
            return Reason("no cut fits"), number
        if excess > _SLACK:
            return Reason(f"no cut fits, the best needs {format_share(1 + excess)} of the memory", 1 + excess), number
        over.append(relaxed.over(cut))
        if over[-1].max() <= 0:
            break
        weights = 0.5 * weights + 0.5 * balance(np.stack(over, axis=1))[0]
    return Reason(), number
