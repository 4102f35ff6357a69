"""What the agent starts in the place of a script: it ends with the agent, whatever happens, and runs the script."""
from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main(agent: int, interface: str, script: str) -> None:
    """Run ``script`` as Python would; this process is killed when ``agent``, its parent, dies.

    gloo and the guard meet other workers on ``interface``, unless it is empty or the environment names another.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:           # it has died before we could ask
        raise SystemExit(1)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:           # every worker has it: as many tracebacks would say nothing
        raise SystemExit(130) from None


if __name__ == "__main__":
    parent, where, name = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    main(int(parent), where, name)
