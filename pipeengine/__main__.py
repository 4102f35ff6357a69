"""``python -m pipeengine``: the command, where its script is not on the path."""
import sys

from pipeengine.cli import main

sys.exit(main())
