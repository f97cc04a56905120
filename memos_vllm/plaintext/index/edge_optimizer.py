"""A process that optimises one closed shard: `python -m ...edge_optimizer FOLDER`.

Optimising holds the GIL from start to end (28 s for 100,000 points), so it has a process to itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import qdrant_edge as edge

_NICENESS = 19
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Optimise the shard that the first argument names; what it reads there is whole on exit 0."""
    if sys.platform == "linux":
        # One whose parent was killed would go on writing to a folder that is being removed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _step_back()
    shard = edge.EdgeShard.load(sys.argv[1])
    shard.optimize()
    shard.flush()
    shard.close()


def _step_back() -> None:
    """Take only the time that nobody else wants."""
    os.nice(_NICENESS)
    # Linux may share cores among sessions first, and niceness counts only within one.
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICENESS), encoding="ascii")


if __name__ == "__main__":
    main()
