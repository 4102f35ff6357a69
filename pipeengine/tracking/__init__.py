"""Values of steps go in; a file of lines, a progress line and experiment trackers come out.

Nothing here can stop or delay training: a tracker that raises, hangs or is not installed is told of once. torch is
loaded for TensorBoard only.
"""

from pipeengine.tracking.backends import set_archives_aside
from pipeengine.tracking.metrics import MetricsFile, plain_values, read_metrics, series
from pipeengine.tracking.progress import Progress, duration
from pipeengine.tracking.telling import Teller
from pipeengine.tracking.trackers import TRACKERS, Tracker, TrackerSetting, make_tracker, name_of

__all__ = ["MetricsFile", "Progress", "TRACKERS", "Teller", "Tracker", "TrackerSetting", "duration", "make_tracker",
           "name_of", "plain_values", "read_metrics", "series", "set_archives_aside"]
