"""The ``pipeengine`` command. torch is imported only for commands that are given a model."""

from pipeengine.cli.main import main

__all__ = ["main"]
