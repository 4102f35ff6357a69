"""A model's costs and the devices that there are go in, the best configuration comes out, with a bound and reasons.

Answers ``pipeengine.search``. Needs no torch for a cost graph.
"""
from pipeengine.exploration.answer import Search, dumps
from pipeengine.exploration.candidates import Choice, Configuration, configuration_in
from pipeengine.exploration.searching import search
from pipeengine.exploration.space import Space
from pipeengine.exploration.training_state import OPTIMIZERS

__all__ = ["Choice", "Configuration", "OPTIMIZERS", "Search", "Space", "configuration_in", "dumps", "search"]
