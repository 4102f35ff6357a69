"""The truth for small spaces: every cut of every point, priced, ordered and played from the definitions alone.

Shares with the search only the orders of the schedules and the two constants of message buffers.
"""
import itertools
import math

from pipeengine.errors import ScheduleError
from pipeengine.program import UNDERWAY, WINDOW
from pipeengine.synthesis import build


def best_of_all(graph_for, space, hardware, training):
    """Seconds of the fastest point and cut of all, and the point; (inf, None) if none fits."""
    best = math.inf, None
    for point in space.points(hardware.num_devices, training.global_rows):
        try:
            schedule = build(point.schedule, num_workers=point.workers, num_microbatches=point.num_microbatches,
                             stages_per_worker=point.stages_per_worker)
        except ScheduleError:
            continue
        best = min(best, (best_cut(graph_for(point.rows), point, schedule, hardware, training), point),
                   key=lambda each: each[0])
    return best


def best_cut(graph, point, schedule, hardware, training):
    nodes, best = list(graph), math.inf
    if schedule.topology.num_stages != point.num_stages:
        return best
    for inner in itertools.combinations(range(1, len(nodes)), point.num_stages - 1):
        ends = (0, *inner, len(nodes))
        if point.recompute == "blocks" and any(_inside_a_block(nodes, end) for end in inner):
            continue
        stages = [nodes[a:b] for a, b in zip(ends, ends[1:])]
        if not all(any(graph.nodes[n]["param_bytes"] for n in stage) for stage in stages):
            continue
        for again in itertools.product(*(_recomputed(stage, point.recompute) for stage in stages)):
            best = min(best, step_seconds(graph, stages, again, point, schedule, hardware, training))
    return best


def _recomputed(stage, grain):
    """What of a stage may run again: nothing or all of it, or its first blocks, by path."""
    if grain != "blocks":
        return ((), tuple(stage)) if grain == "stages" else ((),)
    paths = tuple(dict.fromkeys(block_of(node) for node in stage if block_of(node)))
    return [paths[:count] for count in range(len(paths) + 1)]


def block_of(name):
    return name.rpartition(".")[0] if name.startswith("blocks.") else ""


def _inside_a_block(nodes, end):
    return block_of(nodes[end - 1]) != "" and block_of(nodes[end - 1]) == block_of(nodes[end])


def step_seconds(graph, stages, again, point, schedule, hardware, training):
    """Seconds of a step, inf where a worker has too little memory."""
    worker_of, m = schedule.topology.worker_of, point.num_microbatches
    home = {node: number for number, stage in enumerate(stages) for node in stage}
    passes, returns = {}, {}
    for node, data in graph.nodes(data=True):
        readers = sorted({home[reader] for reader in graph.successors(node)} - {home[node]})
        for stage in readers:
            passes[home[node], stage] = passes.get((home[node], stage), 0) + data["output_bytes"]
        for pair in zip([home[node], *readers], readers):
            returns[pair] = returns.get(pair, 0) + data["output_bytes"]
    received = [sum(size for (_, to), size in passes.items() if to == number) for number in range(len(stages))]
    figures = [_stage(graph, stage, paths, point.recompute, received[number])
               for number, (stage, paths) in enumerate(zip(stages, again))]
    state = 2.0 / point.replicas if point.shard else 2.0        # AdamW's moments
    for worker in range(point.workers):
        own = [figures[s] for s in range(len(stages)) if worker_of[s] == worker]
        need = sum((1 + state) * f["params"] for f in own) + _walk(schedule.actions(worker), figures)
        need += sum(WINDOW * size for size in _arriving(worker, worker_of, passes, returns))
        need += UNDERWAY * max(_arriving(worker, worker_of, returns, passes), default=0)
        if hardware.memory is not None and need > hardware.memory:
            return math.inf

    def hop(a, b, size):
        link = _link(hardware, point, a, b)
        return 0.0 if a == b else link.latency + (size / link.bandwidth if link.bandwidth else 0.0)
    hops = {pair: hop(worker_of[pair[0]], worker_of[pair[1]], max(passes.get(pair, 0), returns.get(pair, 0)))
            for pair in {*passes, *returns}}
    ends = _play(schedule, figures, passes, returns, hops)
    params = [sum(f["params"] for s, f in enumerate(figures) if worker_of[s] == w) for w in range(point.workers)]
    last = max(ends[w] + _after(hardware, point, w, params[w], state) for w in range(point.workers))
    return max(last, m * _traffic(point, worker_of, passes, returns, hop))


def _stage(graph, stage, again, grain, received):
    data = {node: dict(graph.nodes[node]) for node in stage}
    if grain == "blocks":
        for path in again:
            members = [node for node in stage if block_of(node) == path]
            if members:
                outside = {u for node in members for u in graph.predecessors(node)} - set(members)
                data[members[-1]]["workspace_bytes"] += sum(graph.nodes[node]["activation_bytes"] for node in members)
                for node in members:
                    data[node]["backward"] += data[node]["forward"]
                    data[node] |= {"activation_bytes": 0, "weight_grad": 0, "kept_bytes": 0}
                data[members[0]]["activation_bytes"] = sum(graph.nodes[u]["output_bytes"] for u in outside)
    total = {name: sum(each[name] for each in data.values()) for name in
             ("forward", "backward", "weight_grad", "param_bytes", "activation_bytes", "kept_bytes")}
    scratch = []
    for grows in (0, 1):
        level = most = 0
        for node in reversed(stage):
            most = max(most, level + data[node]["workspace_bytes"])
            level += grows * data[node]["param_bytes"] - data[node]["activation_bytes"]
        scratch.append(max(most, level))
    figures = {"F": total["forward"], "B": total["backward"], "I": total["backward"] - total["weight_grad"],
               "W": total["weight_grad"], "params": total["param_bytes"], "keeps": total["activation_bytes"],
               "half": total["kept_bytes"], "scratch": scratch}
    if again and grain == "stages":
        figures |= {"B": figures["B"] + figures["F"], "I": figures["I"] + figures["F"], "keeps": received,
                    "scratch": [each + total["activation_bytes"] for each in scratch]}
    return figures


def _walk(actions, figures):
    level = peak = 0.0
    grown = set()
    for op, stage, _ in actions:
        f, new = figures[stage], op in "BW" and stage not in grown
        if op == "F":
            level += f["keeps"]
            peak = max(peak, level)
            continue
        gradients = f["params"] if new else 0
        grown |= {stage} if new else set()
        if op == "W":
            peak = max(peak, level + max(0, gradients - f["half"]))
            level += gradients - f["half"]
        else:
            peak = max(peak, level + f["scratch"][new])
            level += (gradients if op == "B" else f["half"]) - f["keeps"]
    return peak


def _arriving(worker, worker_of, passes, returns):
    """Bytes of each kind of message that comes to a worker from another."""
    forward = [size for (a, b), size in passes.items() if worker_of[b] == worker != worker_of[a]]
    return forward + [size for (a, b), size in returns.items() if worker_of[a] == worker != worker_of[b]]


def _link(hardware, point, a, b, replica_b=None):
    size = hardware.node_size or hardware.num_devices

    def node(replica, worker):
        place = replica * point.workers + worker if point.near == "stages" else worker * point.replicas + replica
        return place // size
    far = any(node(r, a) != node(r, b) for r in range(point.replicas)) if replica_b is None else any(
        node(r, a) != node(0, a) for r in range(point.replicas))
    return hardware.between if far else hardware.inside


def _after(hardware, point, worker, params, state):
    seconds = (2 * (1 + state * (point.replicas if point.shard else 1)) + 1) * params / (
        point.replicas if point.shard else 1) / hardware.memory_rate if hardware.memory_rate else 0.0
    if point.replicas > 1:
        link, steps = _link(hardware, point, worker, worker, 0), 2 * (point.replicas - 1)
        seconds += steps * link.latency + (steps / point.replicas * params / link.bandwidth if link.bandwidth else 0)
    return seconds


def _traffic(point, worker_of, passes, returns, hop):
    busy = {}
    for turned, sizes in ((False, passes), (True, returns)):
        for (a, b), size in sizes.items():
            source, target = (worker_of[b], worker_of[a]) if turned else (worker_of[a], worker_of[b])
            for key in ((source, "out"), (target, "in")) if source != target else ():
                busy[key] = busy.get(key, 0.0) + hop(source, target, size)
    return max(busy.values(), default=0.0)


def _play(schedule, figures, passes, returns, hops):
    """The end of each worker: every action as soon as its lane and what it waits for allow."""
    lanes = [schedule.actions(worker) for worker in range(schedule.topology.num_workers)]
    at, free, end = [0] * len(lanes), [0.0] * len(lanes), {}
    while any(place < len(lane) for place, lane in zip(at, lanes)):
        moved = False
        for worker, lane in enumerate(lanes):
            while at[worker] < len(lane):
                op, stage, k = lane[at[worker]]
                waits = [] if op == "W" else [(("F", a, k), hops[a, b]) for a, b in passes if b == stage] if (
                    op == "F") else [(("back", b, k), hops[a, b]) for a, b in returns if a == stage]
                if any(wait not in end for wait, _ in waits):
                    break
                start = max([free[worker], *(end[wait] + late for wait, late in waits)])
                free[worker] = start + figures[stage][op]
                end["F" if op == "F" else "W" if op == "W" else "back", stage, k] = free[worker]
                at[worker] += 1
                moved = True
        assert moved, "the order is stuck"
    return free
