"""`python -m memos_vllm.engine`: the server that `engine.supervisor` starts.

Python runs the main module anew in each process that vLLM spawns, unless it is a `__main__`: the
engine and its workers then need not import what only the server does.
"""

from __future__ import annotations

import sys

from memos_vllm.engine.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
