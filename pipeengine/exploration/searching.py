"""``search``: from a model, or its cost graph, and the devices that there are, to the best way to train it."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import networkx as nx

from partitioners import Link
from partitioners import check as check_cost_graph
from partitioners.graph import MASTER
from pipeengine.device_cards import DeviceCard, device_card
from pipeengine.errors import InputError
from pipeengine.exploration.answer import Search
from pipeengine.exploration.branch_and_bound import EFFORT, Outcome, search_space
from pipeengine.exploration.candidates import Loser, check_graph, choice_of, loser_of
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.hardware import Hardware
from pipeengine.exploration.judge import Scene
from pipeengine.exploration.margins import fewest_devices, margins
from pipeengine.exploration.point_search import Verdict
from pipeengine.exploration.row_costs import chains, graphs_of
from pipeengine.exploration.space import Space, Training

if TYPE_CHECKING:
    import torch

OPEN_ROWS = (1, 2, 4, 8, 16)
"""Rows of a micro-batch that are tried unless others are named."""
Choices = Sequence[Any] | Any


def search(model: torch.nn.Module | nx.DiGraph, example: object = None, *, num_devices: int,
           memory: float | None = None, device: str | DeviceCard | None = None, bandwidth: float | None = None,
           inside: float | None = None, node_size: int | None = None, latency: float | None = None,
           rows: int | None = None, optimizer: str = "adamw", master_weights: bool = False,
           costs: str = "analytic",
           loss_fn: Callable | None = None, target: object = None,
           replicas: Choices = (), stages: Choices = (), stages_per_worker: Choices = Space.stages_per_worker,
           microbatch_rows: Choices = (), schedule: Choices = Space.schedule, recompute: Choices = Space.recompute,
           shard: Choices = Space.shard, near: Choices = Space.near, effort: int = EFFORT,
           time_limit: float | None = None, progress: Callable[[str], None] | None = None) -> Search:
    """The fastest way to train ``model`` on ``num_devices`` equal devices, with a bound on all others and reasons.

    ``model`` with an ``example`` of a whole batch (it may be on meta), or a cost graph. ``memory`` in bytes per device;
    ``inside`` and ``bandwidth`` in bytes per second are links within a machine of ``node_size`` devices and between
    machines, ``latency`` their seconds. What is not given is the ``device``'s (the name or file of a card); without a
    device, seconds are a guess. ``rows`` per step, of all replicas (default: the example's). ``master_weights``: the
    optimizer works on copies of four bytes. ``costs``: ``"analytic"``, or ``"measured"`` on the device at hand. Each
    dimension is open, one value, or several: ``replicas``, ``stages`` of one pipeline, ``stages_per_worker``,
    ``microbatch_rows``, ``schedule``, ``recompute`` (``"none"``, ``"stages"``, ``"blocks"``), ``shard`` (None,
    ``"optimizer"``), ``near`` (whether ``"stages"`` or ``"replicas"`` are numbered next to each other). The work is
    bounded by ``effort``, a count, so the answer is the same on every machine; ``time_limit`` in seconds is a cap.
    Raises ``InputError``.
    """
    card = device_card(device) if isinstance(device, str) else device
    _check_counts(num_devices=num_devices, node_size=node_size, rows=rows)
    if isinstance(model, nx.DiGraph):
        check_cost_graph(model)
        known_rows = check_graph(model)
        have = model.graph.get("made_with", {}).get("rows", known_rows)
    else:
        have = _rows_of(model, example, target)
    training = Training(rows or have, optimizer + MASTER * (master_weights and not optimizer.endswith(MASTER)))
    asked = tuple(_several(microbatch_rows))
    wanted = asked or tuple(each for each in OPEN_ROWS if training.global_rows % each == 0)
    space = Space(tuple(_several(replicas)), tuple(_several(stages)), tuple(_several(stages_per_worker)), wanted,
                  tuple(_several(schedule)), tuple(_several(recompute)), tuple(_several(shard)), tuple(_several(near)))
    space.validate(num_devices, training.global_rows)
    wanted = tuple(sorted({point.rows for point in space.points(num_devices, training.global_rows)}))
    if isinstance(model, nx.DiGraph):
        graph_for = graphs_of(lambda _: model, (known_rows,))
    else:
        graph_for = graphs_of(_recorder(model, example, have, card, costs, loss_fn, target, progress),
                              tuple(each for each in wanted if have % each == 0) or (1,))
    size = graph_for(wanted[0]).graph.get("made_with", {}).get("bytes_per_weight")
    training = replace(training, bytes_per_weight=float(size or training.bytes_per_weight))
    hardware = _hardware(num_devices, memory, card, bandwidth, inside, node_size, latency,
                         _precision(training.bytes_per_weight if isinstance(model, nx.DiGraph) else model))
    most = max(point.num_stages for point in space.points(num_devices, training.global_rows))
    chain_for = chains(graph_for, most)
    outcome = search_space(space, hardware, training, chain_for, effort=effort, time_limit=time_limit,
                           progress=progress)
    guess = card is None and costs == "analytic" and not isinstance(model, nx.DiGraph)
    return answer(outcome, space, hardware, training, chain_for, _notes(card, guess), guess)


def answer(outcome: Outcome, space: Space, hardware: Hardware, training: Training,
           chain_for: Callable[[int, str], Chain], notes: tuple[str, ...], is_guess: bool) -> Search:
    """What there is to say about a searched space."""
    best, choice, row = outcome.best, None, ()
    if best is not None:
        chain = chain_for(best.point.rows, best.point.recompute)
        choice = choice_of(best, chain, Scene(best.point, hardware, training), hardware.peak_flops)
        row = tuple(chain.graph.graph.get("made_with", {}).get("row", ()))
    others = [verdict for verdict in outcome.verdicts if best is None or verdict.point != best.point]
    losers = tuple(loser_of(verdict, best) for verdict in others) if best else _refused(others)
    lower = outcome.lower_bound
    seconds = choice.seconds if choice else math.inf
    gap = 0.0 if not choice or seconds <= lower * (1 + 1e-9) else (seconds - lower) / lower if lower else math.inf
    return Search(choice, min(lower, seconds), gap, losers, fewest_devices(space, hardware, training, chain_for),
                  margins(outcome, hardware, training, chain_for), notes, hardware.num_devices, hardware.memory, row,
                  is_guess, outcome.effort, outcome.stopped)


def _refused(verdicts: Sequence[Verdict]) -> tuple[Loser, ...]:
    losers = [Loser(each.point, each.bound, None, str(each.why) or "no cut found that fits") for each in verdicts]
    return tuple(sorted(losers, key=lambda loser: (loser.why.startswith("no"), loser.bound, loser.point.workers)))


def _several(value: Choices) -> Sequence[Any]:
    return tuple(value) if isinstance(value, (tuple, list, range)) else (value,)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        optional = value is None and name != "num_devices"
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}; give a whole number of at least 1")


def _hardware(num_devices: int, memory: float | None, card: DeviceCard | None, bandwidth: float | None,
              inside: float | None, node_size: int | None, latency: float | None, precision: str) -> Hardware:
    """What was said of the devices, and where nothing was, what their card says."""
    delay = latency if latency is not None else card.link_latency if card else 0.0
    between = bandwidth if bandwidth is not None else card.link_between if card else None
    near = inside if inside is not None else card.link_inside if card and bandwidth is None else between
    return Hardware(num_devices, memory if memory is not None else card.memory if card else None, Link(near, delay),
                    Link(between, delay), node_size, card.memory_rate if card else None,
                    card.peak(precision) if card else None)


def _notes(card: DeviceCard | None, guess: bool) -> tuple[str, ...]:
    notes = []
    if guess:
        notes.append("seconds are a guess, of a slow device: only ratios are told. Name a device (--device h100), or "
                     "measure yours (pipeengine profile --device-card FILE)")
    elif card is not None:
        notes.append(f"device {card.name}: {card.source}")
    return tuple(notes)


def _rows_of(model: torch.nn.Module, example: object, target: object) -> int:
    from pipeengine.costs import example_rows
    return example_rows(model, example, target)


def _precision(weights: torch.nn.Module | float) -> str:
    """That of a model, or of weights of so many bytes."""
    if isinstance(weights, float):
        return "bfloat16" if weights == 2.0 else "float32"
    return str(next((p.dtype for p in weights.parameters()), "float32"))


def _recorder(model: torch.nn.Module, example: object, have: int, card: DeviceCard | None, costs: str,
              loss_fn: Callable | None, target: object,
              progress: Callable[[str], None] | None) -> Callable[[int], nx.DiGraph]:
    """Cost graphs of so many of the example's rows."""
    from pipeengine.costs import DeviceDescription, describe, profile
    if costs not in ("analytic", "measured"):
        raise InputError(f'costs is {costs!r}; give "analytic" or "measured", or a cost graph instead of the model')
    described = describe(card, _precision(model)) if card else DeviceDescription()

    def record(rows: int) -> nx.DiGraph:
        if progress:
            progress(f"recording micro-batches of {rows} rows")
        return profile(model, example, num_microbatches=have // rows, loss_fn=loss_fn, target=target,
                       costs=described if costs == "analytic" else costs, progress=progress)
    return record
