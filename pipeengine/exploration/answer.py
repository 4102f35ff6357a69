"""What a search says: the best configuration, how far from the best it may be, and why others lose."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from partitioners.units import format_bytes, format_seconds, format_share
from pipeengine.exploration.candidates import Choice, Loser
from pipeengine.exploration.margins import Fewest, Margin

FORMAT = "pipeline-search/1"
SHOWN = 5


@dataclass(frozen=True)
class Search:
    """The answer. ``best`` can be given to ``Pipeline(..., plan=)``; None where nothing fits.

    No configuration of the space has a step shorter than ``lower_bound`` seconds; ``gap`` is
    ``(best - lower_bound) / lower_bound``. ``candidates`` are the others, the fastest first, with why each loses.
    ``stopped`` says what ended the search before all was settled, "" where nothing did. ``row`` is the shape of a row.
    """

    best: Choice | None
    lower_bound: float
    gap: float
    candidates: tuple[Loser, ...]
    fewest: Fewest | None
    margins: tuple[Margin, ...]
    notes: tuple[str, ...]
    num_devices: int
    memory: float | None
    row: tuple[int, ...]
    is_guess: bool
    effort: int
    stopped: str

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, where a row is a sequence of tokens."""
        return self.best.rows_per_second * self.row[0] if self.best and len(self.row) == 1 else None

    def to_json(self) -> dict:
        """One JSON object."""
        best = self.best.to_json() if self.best else None
        return {"format": FORMAT, "best": best, "lower_bound": self.lower_bound, "gap": self.gap,
                "tokens_per_second": self.tokens_per_second,
                "candidates": [asdict(loser) for loser in self.candidates[:SHOWN]],
                "num_candidates": len(self.candidates), "fewest": asdict(self.fewest) if self.fewest else None,
                "margins": [asdict(margin) for margin in self.margins], "notes": list(self.notes),
                "seconds_are_a_guess": self.is_guess, "effort": self.effort, "stopped": self.stopped}

    def __str__(self) -> str:
        lines = [*self.notes, "" if self.notes else None, *self._about_best(), "", *self._about_gap(), "",
                 *self._about_others(), *self._about_hardware()]
        return "\n".join(line for line in lines if line is not None)

    def _about_best(self) -> list[str]:
        if self.best is None:
            nearest = self.candidates[0].why if self.candidates else "there is no configuration"
            if self.stopped:
                return [f"nothing was found that fits {self.num_devices} devices, and not all was looked at (stopped "
                        f"by {self.stopped}): {nearest}"]
            return [f"nothing fits {self.num_devices} devices: {nearest}"]
        best, config = self.best, self.best.configuration
        recompute = [f"{len(config.recompute)} {'stages' if isinstance(config.recompute[0], int) else 'blocks'} "
                     "computed again"] if config.recompute else []
        parts = [f"{config.num_replicas} replica{'s' * (config.num_replicas > 1)} x {config.num_workers} workers",
                 f"{config.num_stages} stages", f"{config.num_microbatches} micro-batches of {config.rows} "
                 f"row{'s' * (config.rows > 1)}", config.schedule, *recompute,
                 *([f"shard {config.shard}"] if config.shard else [])]
        lines = ["best       " + ", ".join(parts)]
        # Of guessed seconds only the ratios say something.
        if not self.is_guess:
            lines.append(f"step       {format_seconds(best.seconds)}, {best.rows_per_second:,.4g} rows/s" + (
                f", {self.tokens_per_second:,.4g} tokens/s" if self.tokens_per_second else ""))
        share = "" if best.flops_share is None or self.is_guess else (
            f", {format_share(best.flops_share)} of the peak FLOP/s")
        lines.append(f"bubble     {format_share(best.bubble)}{share}")
        room = "" if self.memory is None else f" of {format_bytes(self.memory)}"
        lines.append(f"memory     {format_bytes(min(best.peak_bytes))} to {format_bytes(max(best.peak_bytes))} per "
                     f"worker{room}")
        return lines

    def _about_gap(self) -> list[str]:
        if self.best is None:
            return []
        text = "proved the best of all configurations" if self.gap <= 1e-9 else (
            f"at most {format_share(self.gap, 2)} slower than the best of all configurations")
        return [text + (f" (stopped by {self.stopped})" if self.stopped else "")]

    def _about_others(self) -> list[str]:
        rows = [f"  {loser.point}: {loser.why}" for loser in self.candidates[:SHOWN]]
        return ["next:", *rows, ""] if rows and self.best else rows

    def _about_hardware(self) -> list[str]:
        lines = [f"{margin.change}: {format_share(margin.gain, signed=True)} rows/s" for margin in self.margins]
        if self.fewest is not None:
            proof = "proved" if self.fewest.proved else "not proved"
            lines.append(f"fewest devices: {self.fewest.num_devices} ({self.fewest.point}); one less is refused "
                         f"({proof}): {self.fewest.why}")
        return lines


def dumps(search: Search) -> str:
    """The answer as JSON text; what is infinite is null."""
    def finite(value: object) -> object:
        if isinstance(value, float):
            return value if abs(value) < float("inf") else None
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        return [finite(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
    return json.dumps(finite(search.to_json()))
