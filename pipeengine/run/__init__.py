"""A folder and a pipeline go in, a training that resumes, tracks and reports itself comes out."""

from pipeengine.run.run import Run

__all__ = ["Run"]
