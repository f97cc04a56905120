"""Measures plain vLLM against itself, on any server.

python -m tests.exactness.yardstick --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse

import httpx

from memos_vllm.bench.yardstick import MAX_TOKENS, REQUEST_SECONDS, Asker, measure, table
from tests.exactness.prompts import QUESTIONS, composed_messages


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure plain vLLM against itself.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, trust_env=False, timeout=REQUEST_SECONDS) as client:
        asker = Asker(client, max_tokens=args.max_tokens)
        yardstick, _ = measure(asker, [composed_messages(question) for question in QUESTIONS])
    print(table(yardstick))


if __name__ == "__main__":
    main()
