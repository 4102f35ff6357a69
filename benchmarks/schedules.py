"""Figures for schedules, none of which needs torch or more than one core.

    python benchmarks/schedules.py table             schedules x (equal stages, heavy head) x micro-batches, simulated
    python benchmarks/schedules.py scale [ACTIONS]   seconds to generate, check, simulate, lower, check; 10^4 to 10^7
    python benchmarks/schedules.py auto              how far synthesised orders are above a bound that nothing beats
    python benchmarks/schedules.py channel           what one shared in-order channel costs
"""
from __future__ import annotations

import random
import resource
import sys
import time

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.program.lowering import lower
from pipeengine.program.single_channel import simulate_channel
from pipeengine.schedules.schedule import Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.memory import peak_activations
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.auto import auto
from pipeengine.synthesis.bound import lower_bound
from pipeengine.synthesis.registry import SCHEDULES, build


def stage_costs(topology: Topology, head: float, hop: float) -> Costs:
    """32 layers of F : I : W = 1 : 1.1 : 0.9 in equal parts per stage; ``head`` more layers on the last one."""
    layers = [32 / topology.num_stages] * topology.num_stages
    layers[-1] += head
    share = topology.shares()
    return Costs(layers, [1.1 * x for x in layers], [0.9 * x for x in layers], hop=hop, activation=tuple(share),
                 weight_activation=tuple(share))


def balanced_costs(topology: Topology, head: float, hop: float) -> Costs:
    """The same work with the head's weight spread by whole layers: what a planner does with it."""
    even = (32 + head) / topology.num_stages
    layers = [float(round(even * (s + 1)) - round(even * s)) for s in range(topology.num_stages)]
    layers[-1] = 32 + head - sum(layers[:-1])
    share = topology.shares()
    return Costs(layers, [1.1 * x for x in layers], [0.9 * x for x in layers], hop=hop, activation=tuple(share),
                 weight_activation=tuple(share))


def table() -> None:
    """Step time in forwards of one layer, 8 workers; in brackets the peak in micro-batches of a whole worker."""
    cases = [(name, make, m) for name, make in (
        ("equal", lambda t: stage_costs(t, 0, 0.05)), ("heavy head", lambda t: stage_costs(t, 2.4, 0.05)),
        ("head, rebalanced", lambda t: balanced_costs(t, 2.4, 0.05))) for m in (8, 16, 32)]
    print("| schedule | " + " | ".join(f"{name}, m={m}" for name, _, m in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for schedule_name in SCHEDULES:
        cells = []
        for _, make, m in cases:
            try:
                topology = build(schedule_name, num_workers=8, num_microbatches=m).topology
                if topology.num_routes > 1:
                    raise ScheduleError("two copies of the model")
                costs = make(topology)
                schedule = build(schedule_name, num_workers=8, num_microbatches=m, costs=costs)
                cells.append(f"{simulate(schedule, costs).makespan:.1f} "
                             f"({peak_activations(schedule, costs).max():.3g})")
            except ScheduleError:
                cells.append("-")
        print(f"| {schedule_name} | " + " | ".join(cells) + " |")


SHAPES = (("1f1b", 8, 1, 2), ("1f1b", 1024, 1, 2), ("gpipe", 8, 1, 2), ("zb-h1", 1024, 1, 3), ("bfs", 64, 2, 4),
          ("interleaved-1f1b", 64, 8, 16), ("interleaved-zb", 16, 2, 6), ("zb-v", 8, 2, 6), ("v-half", 16, 2, 6),
          ("dualpipe-v", 8, 2, 4))


def scale(most: int) -> None:
    """CPU seconds of each pass, stages up to 30 % apart, a message a tenth of a forward; a line per shape and size."""
    print(f"{'schedule':17} {'workers':>7} {'actions':>11}  generate   check  simulate   lower  "
          "check program   total  us/action  peak GB")
    for name, workers, stages_per_worker, per in SHAPES:
        for actions in (10 ** k for k in range(4, 8)):
            microbatches = round(actions / workers / per)
            if actions <= most and microbatches >= 2 * workers:
                _passes(name, workers, stages_per_worker, microbatches)


def _passes(name: str, workers: int, stages_per_worker: int, microbatches: int) -> None:
    laps = [time.process_time()]
    schedule = build(name, num_workers=workers, num_microbatches=microbatches, stages_per_worker=stages_per_worker)
    laps.append(time.process_time())
    check(schedule)
    laps.append(time.process_time())
    draw, stages = random.Random(0), schedule.topology.num_stages
    costs = Costs(*([draw.uniform(0.7, 1.3) for _ in range(stages)] for _ in range(3)), hop=0.1)
    simulate(schedule, costs)
    laps.append(time.process_time())
    program = lower(schedule, costs=costs)
    laps.append(time.process_time())
    check(program)
    laps.append(time.process_time())
    generate, checked, simulated, lowered, proved = (b - a for a, b in zip(laps, laps[1:]))
    total = laps[-1] - laps[0]
    print(f"{name:17} {workers:7} {schedule.num_actions:11,}  {generate:8.3f} {checked:7.3f} {simulated:9.3f} "
          f"{lowered:7.3f} {proved:14.3f} {total:7.2f} {total / schedule.num_actions * 1e6:10.2f} "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f}", flush=True)


def gaps() -> None:
    """24 random pipelines: 4 to 8 workers, p to 4p micro-batches, stages 5 to 35 % apart, hops up to 0.1 forwards."""
    print("memory  kept for W   mean above bound    max   proved optimal   CPU s each")
    for memory in (1.0, 1.25, 1.5):
        for kept in (0.5, 1.0):
            above, begin = [], time.process_time()
            for seed in range(24):
                workers, microbatches, costs = _instance(seed, kept)
                schedule = auto(workers, microbatches, costs=costs, max_peak=memory * workers)
                bound = lower_bound(schedule.topology, microbatches, costs, memory * workers)
                above.append(simulate(schedule, costs).makespan / bound - 1)
            print(f"{memory:4.2f} p  {kept:10.1f}  {100 * sum(above) / 24:15.2f} %  {100 * max(above):5.2f} %  "
                  f"{sum(x < 1e-9 for x in above):10} / 24  {(time.process_time() - begin) / 24:11.2f}")


def _instance(seed: int, kept: float) -> tuple[int, int, Costs]:
    draw = random.Random(seed)
    p = draw.randint(4, 8)
    m, spread = draw.randint(p, 4 * p), draw.uniform(0.05, 0.35)
    f, i, w = ([base * draw.uniform(1 - spread, 1 + spread) for _ in range(p)]
               for base in (1, draw.uniform(0.9, 1.3), draw.uniform(0.6, 1.0)))
    return p, m, Costs(f, i, w, hop=draw.uniform(0, 0.1), activation=[1] * p, weight_activation=[kept] * p)


def channel() -> None:
    """Percent longer on one in-order channel per worker, by hop (in forwards of a worker).

    4 and 8 workers, m = 2p and 4p. The largest of the four for equal stages; their mean for stages up to 30 % apart.
    """
    hops = (0.05, 0.1, 0.2)
    print("| schedule | " + " | ".join(f"{kind}, hop {hop}" for kind in ("equal", "30 % apart") for hop in hops) + " |")
    print("|---" * 7 + "|")
    for name in SCHEDULES:
        equal = [max(_channel_losses(name, hop, 0.0)) for hop in hops]
        apart = [sum(_channel_losses(name, hop, 0.3)) / 4 for hop in hops]
        print(f"| `{name}` | " + " | ".join(f"{100 * loss:.2f} %" for loss in equal + apart) + " |")


def _channel_losses(name: str, hop: float, spread: float) -> list[float]:
    losses = []
    for workers, microbatches in ((4, 8), (4, 16), (8, 16), (8, 32)):
        schedule, draw = build(name, num_workers=workers, num_microbatches=microbatches), random.Random(microbatches)
        costs = Costs(*([share * draw.uniform(1 - spread, 1 + spread) for share in schedule.topology.shares()]
                        for _ in range(3)), hop=hop)
        program = lower(schedule, costs=costs)
        losses.append(simulate_channel(program, costs).makespan / simulate(program, costs).makespan - 1)
    return losses


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["table"]
    if what == "scale":
        scale(int(float(rest[0])) if rest else 10 ** 7)
    elif what in ("table", "auto", "channel"):
        {"table": table, "auto": gaps, "channel": channel}[what]()
    else:
        sys.exit(__doc__)
