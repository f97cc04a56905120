"""The process of the embedded index: `python -m ...edge_worker FD DIR SECONDS`.

FD is its socket to the caller; SECONDS is how long it waits for the folder.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path

from memos_vllm.plaintext.index.edge_host import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Path(sys.argv[2]), wait_seconds=float(sys.argv[3]))
