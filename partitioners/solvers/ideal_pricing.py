"""What lies between two ideals costs."""
from __future__ import annotations

import numpy as np

from partitioners.solvers.ideals import Ideals
from partitioners.solvers.problem import Kind


class IdealPricer:
    """Loads of stages ``[ideal, other)`` of one kind, for one ideal and a range of others."""

    def __init__(self, ideals: Ideals, kind: Kind) -> None:
        problem = self.problem = ideals.problem
        self.ideals, self.kind = ideals, kind
        times = problem.times[kind.device]
        self.work = ideals.sums(np.where(np.isfinite(times), times, 0.0))
        self.forbidden = None if np.isfinite(times).all() else ideals.sums((~np.isfinite(times)).astype(float))
        self.pays = kind.device.pays_link and any(net.seconds(kind.link_in) or net.seconds(kind.link_out)
                                                  for net in problem.nets)
        self.symmetric = problem.objective == "sum" and kind.symmetric
        self.memory = None
        if kind.device.memory is not None and problem.memory_may_bind():
            self.memory = ideals.sums(problem.fixed_bytes + kind.in_flight * problem.activation_bytes)
            self.shared = [(ideals.set_of(pins), size) for pins, size in problem.shared]
            self.workspace = [(ideals.set_of(np.flatnonzero(problem.workspace_bytes == size)), float(size))
                              for size in np.unique(problem.workspace_bytes)[::-1] if size]
        if self.pays:
            self._prepare_nets()

    def _prepare_nets(self) -> None:
        """Sets, prices and open ranges of the nets, and what each ideal's own cut costs."""
        ideals, merged = self.ideals, {}
        for net in self.problem.nets:
            price_in, price_out = net.seconds(self.kind.link_in), net.seconds(self.kind.link_out)
            key = (-1 if self.symmetric else net.source, net.pins)
            entry = merged.setdefault(key, [0.0, 0.0])
            both = price_in + price_out if net.source < 0 else price_in
            entry[0] += both if self.symmetric else price_in
            entry[1] += price_out
        self.nets = []
        self.cut_in, self.cut_out = np.zeros(len(ideals)), np.zeros(len(ideals))
        for (source, pins), (price_in, price_out) in merged.items():
            group, head = ideals.set_of(pins), ideals.set_of([source]) if source >= 0 else None
            tail = group if source < 0 else ideals.set_of([pin for pin in pins if pin != source])
            low = int(ideals.first[group.masks[0][0]])
            high = min(int(ideals.first[group.masks[-1][0] + 1]) + 1, len(ideals))
            some, every = ideals.any_all(group, low, high)
            self.nets.append((group, head, tail, price_in, price_out, low, high, some & ~every))
            if head is None:
                crossing = some & ~every
                self.cut_in[low:high] += price_in * crossing
                self.cut_out[low:high] += price_out * crossing
            else:
                made, _ = ideals.any_all(head, low, high)
                read, _ = ideals.any_all(tail, low, high)
                self.cut_out[low:high] += price_out * (made & ~every)
                self.cut_in[low:high] += price_in * (read & ~made)
        self.lows = np.array([net[5] for net in self.nets])
        self.highs = np.array([net[6] for net in self.nets])

    def open_nets(self, ideal: int) -> list[tuple]:
        """Nets of which ``ideal`` holds some but not all."""
        near = np.flatnonzero((self.lows <= ideal) & (ideal < self.highs))
        return [self.nets[net] for net in near if self.nets[net][7][ideal - self.lows[net]]]

    def loads(self, ideal: int, low: int, high: int) -> np.ndarray:
        """Seconds of the stages from ``ideal`` to each of the ideals ``low .. high``; inf where that is no stage."""
        work = self.work[low:high] - self.work[ideal]
        if self.pays:
            work = self._add_links(work, ideal, low, high)
        bad = ~self.ideals.supersets(ideal, low, high)
        if self.forbidden is not None:
            bad |= self.forbidden[low:high] > self.forbidden[ideal]
        if self.memory is not None:
            bad |= self._memory(ideal, low, high) > self.kind.device.memory * (1 + 1e-12)
        work[bad] = np.inf
        return work

    def _add_links(self, work: np.ndarray, ideal: int, low: int, high: int) -> np.ndarray:
        ideals, opened = self.ideals, self.open_nets(ideal)
        if self.symmetric:
            total = self.cut_in[low:high].copy()
            for group, _, _, price, _, *_ in opened:
                some, every = ideals.any_all(ideals.without(group, ideal), low, high)
                # Open behind and ahead, the net is in ``total`` once, whether this stage touches it or not.
                total += price * (some.astype(float) - ~every)
            return work + np.maximum(total, 0.0)
        into, out = self.cut_in[low:high].copy(), self.cut_out[low:high].copy()
        for group, head, tail, price_in, price_out, *_ in opened:
            some, every = ideals.any_all(ideals.without(group, ideal), low, high)
            if head is None:
                into += price_in * (some.astype(float) - ~every)
                out += price_out * (some.astype(float) - ~every)
                continue
            made, _ = ideals.any_all(head, low, high)
            read, _ = ideals.any_all(tail, low, high)
            out -= price_out * (made & ~every)
            into -= price_in * (read & ~made)
            rest = ideals.without(tail, ideal)
            new = ideals.any_all(rest, low, high)[0] if rest.masks else np.zeros(high - low, bool)
            if ideals.without(head, ideal).masks:
                out += price_out * made
                into += price_in * (new & ~made)
            else:
                into += price_in * new
        if self.problem.objective == "sum":
            return work + np.maximum(into, 0.0) + np.maximum(out, 0.0)
        return np.maximum(work, np.maximum(into, out))

    def _memory(self, ideal: int, low: int, high: int) -> np.ndarray:
        need = self.memory[low:high] - self.memory[ideal]
        for group, size in self.shared:
            rest = self.ideals.without(group, ideal)
            if rest.masks:
                need += size * self.ideals.any_all(rest, low, high)[0]
        left = np.ones(high - low, bool)
        for group, size in self.workspace:
            rest = self.ideals.without(group, ideal)
            if rest.masks:
                held = self.ideals.any_all(rest, low, high)[0] & left
                need += size * held
                left &= ~held
        return need
