"""A schedule and costs go in, a ``Timeline`` comes out. Seconds and bytes. No torch."""
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.critical_path import Stuck, Wait, completes, solve
from pipeengine.simulation.dependencies import waits
from pipeengine.simulation.from_plan import costs_of, edges_of
from pipeengine.simulation.link_times import LinkTimes
from pipeengine.simulation.memory import memory_model_of, microbatches_in_flight, peak_activations
from pipeengine.simulation.simulator import Breakdown, breakdown, simulate
from pipeengine.simulation.timeline import OPS, RA, RG, SA, SG, R, Timeline

__all__ = ["Breakdown", "Costs", "LinkTimes", "OPS", "R", "RA", "RG", "SA", "SG", "Stuck", "Timeline", "Wait",
           "breakdown", "completes", "costs_of", "edges_of", "memory_model_of", "microbatches_in_flight",
           "peak_activations", "simulate", "solve", "waits"]
