"""A problem goes in, stages and a bound come out: exact where that can be proved."""

from partitioners.solvers.bounds import simple_bound
from partitioners.solvers.chains import split_sequence
from partitioners.solvers.coarse import crossing_tensors, merge_runs, promising_positions
from partitioners.solvers.interleave import interleave
from partitioners.solvers.period import period, round_trips, shortest_period
from partitioners.solvers.problem import Problem, build_problem, frozen_names, reorder, transfer
from partitioners.solvers.recompute import Choice, choose_recomputed, recomputing_loads, with_recomputation
from partitioners.solvers.search import loads_of, solve
from partitioners.solvers.segments import best_cuts, fewest_cuts, segment_loads, segment_memory

__all__ = [
    "Choice",
    "Problem",
    "best_cuts",
    "build_problem",
    "choose_recomputed",
    "crossing_tensors",
    "fewest_cuts",
    "frozen_names",
    "interleave",
    "loads_of",
    "merge_runs",
    "period",
    "promising_positions",
    "recomputing_loads",
    "reorder",
    "round_trips",
    "segment_loads",
    "segment_memory",
    "shortest_period",
    "simple_bound",
    "solve",
    "split_sequence",
    "transfer",
    "with_recomputation",
]
