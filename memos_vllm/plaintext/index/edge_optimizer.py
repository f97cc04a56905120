"""A process that optimises one closed shard: `python -m ...edge_optimizer FOLDER`.

With `--into FRESH DIM` the shard stays as it is, and its points are put into a new one in FRESH.

Optimising holds the GIL from start to end (28 s for 100,000 points), so it has a process to itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import qdrant_edge as edge

from memos_vllm.parent_death import end_with_parent
from memos_vllm.plaintext.index.edge_shards import copy_points, create_shard

_NICENESS = 19
_BATCH = 256


def main() -> None:
    """Optimise the shard that the first argument names; what it reads there is whole on exit 0."""
    # One whose parent was killed would go on writing to a folder that is being removed.
    end_with_parent(signal.SIGKILL)
    _step_back()
    folder, *into = sys.argv[1:]
    shard = edge.EdgeShard.load(folder)
    if into:
        _, fresh, dim = into
        shard = _written_anew(shard, Path(fresh), dim=int(dim))
    shard.optimize()
    shard.flush()
    shard.close()


def _written_anew(shard: edge.EdgeShard, path: Path, *, dim: int) -> edge.EdgeShard:
    """A shard of the same points, with nothing of what was deleted or replaced."""
    fresh = create_shard(path, dim=dim)
    copy_points(shard, fresh, batch=_BATCH)
    shard.close()
    return fresh


def _step_back() -> None:
    """Take only the time that nobody else wants."""
    os.nice(_NICENESS)
    # Linux may share cores among sessions first, and niceness counts only within one.
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICENESS), encoding="ascii")


if __name__ == "__main__":
    main()
