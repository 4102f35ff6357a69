"""A recording goes in, a cost graph comes out: seconds and bytes of every node, measured or estimated.

``partitioners`` plans such a graph.
"""
from pipeengine.costs.cost_graph import cost_graph
from pipeengine.costs.device_measuring import measure_device
from pipeengine.costs.measured import measure
from pipeengine.costs.profiling import example_rows, made_up_target, profile
from pipeengine.costs.recompute_pricing import price_modules, price_stages
from pipeengine.costs.roofline import DeviceDescription, analytic, describe

__all__ = ["DeviceDescription", "analytic", "cost_graph", "describe", "example_rows", "made_up_target", "measure",
           "measure_device", "price_modules", "price_stages", "profile"]
