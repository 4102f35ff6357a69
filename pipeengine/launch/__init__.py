"""A script goes in, workers that run it come out: torchrun's agent with the settings that make a restart work."""

from pipeengine.launch.agent import LaunchSettings, launch, parse_workers

__all__ = ["LaunchSettings", "launch", "parse_workers"]
