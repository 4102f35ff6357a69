"""Tables of the planner: published optima, other balancers on the same graphs, scale, and the hard case.

    python benchmarks/partition.py optima | balancers | scale | nasnet | variants | all

CPU seconds of one process. The other balancers are written from their published descriptions.
"""
from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import networkx as nx
import numpy as np

from partitioners import MemoryModel, partition, read_workload, split_sequence, verify
from partitioners.graph.devices import Cluster, Device, Link
from partitioners.solvers.problem import Problem, build_problem
from partitioners.solvers.segments import segment_loads

DATA = Path(__file__).parent.parent / "tests" / "data"
NASNET = "P_nasnetamobile"


def timed(run: Callable):
    """What ``run`` returns, and the CPU seconds it took."""
    begin = time.process_time()
    return run(), time.process_time() - begin


def cases() -> list[tuple[str, str, float]]:
    optimum = json.loads((DATA / "partition_optima.json").read_text())["optimum"]
    return [(name, key, value) for name, each in optimum.items() for key, value in each.items()]


def options(key: str) -> dict:
    """The arguments of ``partition`` that a case stands for."""
    if key.startswith("bw"):
        bandwidth, stages = key[2:].split(",k")
        return {"bandwidth": float(bandwidth), "num_stages": int(stages)}
    return {} if key.startswith("published") else {"num_stages": int(key[1:].split(",")[0])}


def solve_file(name: str, key: str):
    graph = read_workload(DATA / f"{name}.json")
    return partition(graph, allow_empty=True, prefer_single_tensor=0, **options(key))


def optima() -> None:
    """Every case with a known optimum, reading and proof included."""
    print(f"{'workload':24} {'case':20} {'optimum ms':>12} {'found / optimum - 1':>20} {'gap':>8} {'CPU s':>7}")
    total = published = 0.0
    for name, key, best in cases():
        plan, seconds = timed(lambda: solve_file(name, key))
        verify(plan, read_workload(DATA / f"{name}.json"))
        total += seconds
        published += seconds if key.startswith("published") else 0.0
        print(f"{name:24} {key:20} {best:12.6f} {plan.bottleneck * 1e3 / best - 1:20.1e} "
              f"{plan.gap:8.1e} {seconds:7.3f}")
    print(f"published devices together {published:.2f} s, all {len(cases())} cases {total:.2f} s")


def equal_count(weights: Sequence[float], parts: int) -> list[int]:
    """As many layers on each stage."""
    return [round(part * len(weights) / parts) for part in range(parts + 1)]


def least_spread(weights: Sequence[float], parts: int) -> list[int]:
    """DeepSpeed's ``partition_balanced``: dynamic programming on the largest minus the smallest part so far."""
    sums, size = np.concatenate(([0.0], np.cumsum(weights))), len(weights)
    largest, smallest = np.full((parts + 1, size + 1), np.inf), np.full((parts + 1, size + 1), np.inf)
    spread, parent = np.full((parts + 1, size + 1), np.inf), np.zeros((parts + 1, size + 1), int)
    largest[0, 0], spread[0, 0] = 0.0, 0.0
    for part in range(1, parts + 1):
        for end in range(1, size + 1):
            last = sums[end] - sums[:end]
            high, low = np.maximum(largest[part - 1, :end], last), np.minimum(smallest[part - 1, :end], last)
            difference = np.where(np.isfinite(spread[part - 1, :end]), high - low, np.inf)
            start = int(difference.argmin())
            spread[part, end], parent[part, end] = difference[start], start
            largest[part, end], smallest[part, end] = high[start], low[start]
    cuts = [size]
    for part in range(parts, 0, -1):
        cuts.append(int(parent[part, cuts[-1]]))
    return cuts[::-1]


def block_partition(weights: Sequence[float], parts: int) -> list[int]:
    """torchgpipe's balancer: Block Partitions of Sequences (Barany and Grinberg).

    Costs count less the smallest, scaled to 1. Items wander from the largest block to the nearest
    smallest one until largest and smallest differ by at most 1.
    """
    values = np.asarray(weights, float) - min(weights)
    sums = np.concatenate(([0.0], np.cumsum(values / (values.max() or 1.0))))
    cuts, seen = equal_count(weights, parts), set()
    while tuple(cuts) not in seen:
        seen.add(tuple(cuts))
        blocks = np.diff(sums[cuts])
        if blocks.max() <= blocks.min() + 1:
            break
        big = int(blocks.argmax())
        small = min(np.flatnonzero(blocks <= blocks.min() + 1e-12), key=lambda block: abs(int(block) - big))
        step = -1 if small < big else 1
        for block in range(big, int(small), step):
            cuts[block + (step > 0)] -= step
            if sums[cuts[block + step + 1]] - sums[cuts[block + step]] <= blocks.max():
                break
    return cuts


BALANCERS = {"equal layers": equal_count, "DeepSpeed": least_spread, "torchgpipe": block_partition}


def balancers() -> None:
    """Ratios to the optimum: other balancers see only each layer's time, and are priced with its traffic."""
    wanted = [case for case in cases() if case[1] in ("k4,0cpu", "k8,0cpu", "bw1.6e+10,k4", "bw1.6e+10,k8")]
    print(f"{'workload':24} {'case':14} " + " ".join(f"{name:>14}" for name in BALANCERS) + f"{'ours':>10}")
    ratios: dict[str, list[float]] = {name: [] for name in (*BALANCERS, "ours")}
    for name, key, best in wanted:
        problem = _problem(read_workload(DATA / f"{name}.json"), options(key))
        loads = segment_loads(problem, problem.levels[0])
        weights = problem.times[problem.levels[0].device]
        for balancer, cut in BALANCERS.items():
            places = cut(weights.tolist(), problem.num_stages)
            ratios[balancer].append(max(loads[a, b] for a, b in zip(places, places[1:])) * 1e3 / best)
        ratios["ours"].append(solve_file(name, key).bottleneck * 1e3 / best)
        print(f"{name:24} {key:14} " + " ".join(f"{ratios[each][-1]:14.3f}" for each in BALANCERS)
              + f"{ratios['ours'][-1]:10.6f}")
    for word, pick in (("mean", np.mean), ("worst", np.max)):
        print(f"{word:39} " + " ".join(f"{pick(ratios[each]):14.3f}" for each in BALANCERS)
              + f"{pick(ratios['ours']):10.6f}")


def _problem(graph: nx.DiGraph, given: dict) -> Problem:
    device = Device("acc", given["num_stages"])
    return build_problem(graph, cluster=Cluster((device,), links=(Link(given.get("bandwidth")),)), objective="sum",
                         num_stages=given["num_stages"], memory_model=MemoryModel(),
                         num_microbatches=1, allow_empty=True)


def decoder(layers: int) -> nx.DiGraph:
    """Operators of a decoder-only transformer with grouped queries, rotary tables, residuals and a heavy head."""
    chance, graph = random.Random(0), nx.DiGraph()

    def op(seconds: float, *inputs: int, parameters: float = 0.0, size: float = 8e6, gradient: bool = True) -> int:
        node = len(graph)
        graph.add_node(node, forward=seconds * chance.uniform(0.95, 1.05),
                       backward=2 * seconds * chance.uniform(0.95, 1.05),
                       output_bytes=size, gradient=gradient, param_bytes=parameters, activation_bytes=size, order=node)
        graph.add_edges_from((source, node) for source in inputs)
        return node
    tokens = op(0.0, size=1e4, gradient=False)
    hidden = op(1e-4, tokens, parameters=1e8)
    places = op(1e-6, tokens, size=1e4, gradient=False)
    tables = op(1e-6, places, size=5e5, gradient=False), op(1e-6, places, size=5e5, gradient=False)

    def rotate(value: int, size: float) -> int:
        turned = op(1e-5, op(1e-5, value, size=size), tables[1], size=size)
        return op(1e-5, op(1e-5, value, tables[0], size=size), turned, size=size)
    for _ in range(layers):
        norm = op(2e-5, hidden, parameters=1e4)
        query = rotate(op(1e-5, op(3e-4, norm, parameters=1e7)), 8e6)
        key = rotate(op(1e-5, op(1e-4, norm, parameters=2e6, size=1e6), size=1e6), 1e6)
        value = op(1e-6, op(1e-4, norm, parameters=2e6, size=1e6), size=1e6)
        attended = op(1e-6, op(5e-4, query, key, value))
        hidden = op(1e-5, hidden, op(3e-4, attended, parameters=1e7))
        norm = op(2e-5, hidden, parameters=1e4)
        gate = op(3e-5, op(8e-4, norm, parameters=3e7, size=2.4e7), size=2.4e7)
        wide = op(3e-5, gate, op(8e-4, norm, parameters=3e7, size=2.4e7), size=2.4e7)
        hidden = op(1e-5, hidden, op(8e-4, wide, parameters=3e7))
    op(1e-3, op(5e-3, op(2e-5, hidden), parameters=1e8, size=1e9), size=4)
    return graph


def tangle(nodes: int) -> nx.DiGraph:
    """A long random DAG with short edges."""
    chance, graph = random.Random(1), nx.DiGraph()
    for node in range(nodes):
        graph.add_node(node, forward=chance.lognormvariate(0, 1), output_bytes=chance.choice([1, 2, 4]) * 1e6,
                       param_bytes=10, order=node, gradient=True)
        graph.add_edges_from((max(0, node - 1 - int(chance.expovariate(0.4))), node) for _ in range(2) if node)
    return graph


def scale() -> None:
    """Chains, transformers, and graphs too large for more than orders."""
    costs = np.random.default_rng(0).lognormal(size=10_000)
    seconds = min(timed(lambda: split_sequence(costs, 64))[1] for _ in range(5))
    print(f"chain of 10,000 on 64 stages: {seconds * 1e3:.1f} ms, exact")
    for layers, bandwidth in ((76, None), (76, 25e9), (240, None), (240, 25e9)):
        graph = decoder(layers)
        for prefer in (0.0, 0.05):
            plan, seconds = timed(lambda: partition(graph, 16, bandwidth=bandwidth, prefer_single_tensor=prefer))
            print(f"decoder of {len(graph):,} operators on 16 stages, bandwidth {bandwidth}, prefer one tensor within "
                  f"{prefer}: {seconds:.2f} s, gap {plan.gap:.2%}")
    for nodes in (25_000, 50_000, 100_000):
        graph = tangle(nodes)
        plan, seconds = timed(lambda: partition(graph, 64, bandwidth=1e7, prefer_single_tensor=0))
        print(f"random graph of {nodes:,} nodes on 64 stages: {seconds:.1f} s, gap {plan.gap:.2%}")


def nasnet() -> None:
    """NASNet, whose ideals cannot be counted: wall seconds, since the search is limited by time."""
    graph = read_workload(DATA / f"{NASNET}.json")
    for stages, limit in ((2, 60), (4, 60), (8, 60), (16, 180)):
        begin = time.monotonic()
        plan = partition(graph, stages, bandwidth=16e9, allow_empty=True, prefer_single_tensor=0,
                         gap=0.01, time_limit=limit)
        verify(plan, graph)
        print(f"NASNet on {stages} stages: {plan.bottleneck * 1e3:.3f} ms, gap {plan.gap:.2%} in "
              f"{time.monotonic() - begin:.0f} s", flush=True)


def variants() -> None:
    """Several stages per worker against one, on the published graphs."""
    print(f"{'workload':24} {'one':>9} {'two':>9} {'three':>9} {'W / k':>9}   bottleneck in ms on six workers")
    for name in sorted({name for name, key, _ in cases() if key == "published devices"}):
        graph = read_workload(DATA / f"{name}.json")
        found = [partition(graph, 6, allow_empty=True, prefer_single_tensor=0)]
        found += [partition(graph, 6 * times, stages_per_worker=times, prefer_single_tensor=0) for times in (2, 3)]
        print(f"{name:24} " + " ".join(f"{plan.bottleneck * 1e3:9.3f}" for plan in found)
              + f" {found[-1].lower_bound * 1e3:9.3f}")


TABLES = {"optima": optima, "balancers": balancers, "scale": scale, "nasnet": nasnet, "variants": variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    wanted = parser.parse_args().table
    for name in TABLES if wanted == "all" else (wanted,):
        TABLES[name]()


if __name__ == "__main__":
    main()
