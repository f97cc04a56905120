"""The block pool, and other people's prompts that fill it."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from memos_vllm.client import AsyncMOS
from memos_vllm.errors import MemosError

_CONCURRENCY = 4
_PROMPT_WORDS = 900
# Of the pool, for prompts that run at the same time. Memory may keep a quarter, and gives way to a
# request that needs more than the rest: that would be another measurement.
_RUNNING_SHARE = 0.75
# Some more tokens than the pool holds, so that its last block is surely taken.
FLOOD_SHARE = 1.1
_WORDS = (
    *("river", "stone", "garden", "winter", "letter", "market", "bridge", "window", "music"),
    *("paper", "silver", "forest", "morning", "engine", "harbour", "candle", "summer", "copper"),
    *("island", "pepper", "thunder", "velvet", "orange", "pocket", "shadow", "ladder", "kitten"),
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Pool:
    """The engine's KV pool."""

    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def read_pool(url: str) -> Pool:
    """The size of the engine's KV pool, from the server's metrics."""
    try:
        metrics = httpx.get(f"{url}/metrics", timeout=10.0, trust_env=False)
    except httpx.HTTPError as error:
        raise MemosError(f"the server's /metrics cannot be read: {error}") from error
    return parse_pool(metrics.text)


def parse_pool(metrics: str) -> Pool:
    """Find the pool in a Prometheus page.

    Raises:
        MemosError: the page does not say.
    """
    for line in metrics.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = dict(_LABEL.findall(line))
            sizes = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if all(size.isdigit() for size in sizes):
                return Pool(*map(int, sizes))
    raise MemosError("the server's /metrics do not tell the size of its KV pool")


async def flood(
    url: str, pool: Pool, *, seed: int, progress: Callable[[str], None] = lambda _: None
) -> int:
    """Send long prompts that share nothing until they have filled the pool and a bit more.

    So many at once that they fit beside what memory may keep.

    Returns:
        The tokens that were sent.
    """
    wanted = pool.num_tokens * FLOOD_SHARE
    words = random.Random(seed)
    sent = 0

    async with AsyncMOS(url) as mos:

        async def keep_asking() -> None:
            nonlocal sent
            while sent < wanted:
                # A word is a token here, and some; the reply says how many.
                sent += _PROMPT_WORDS
                reply = await mos.chat(
                    " ".join(words.choices(_WORDS, k=_PROMPT_WORDS)),
                    options={"max_tokens": 1, "temperature": 0},
                )
                sent += max(0, int(reply.usage.get("prompt_tokens", 0)) - _PROMPT_WORDS)
                progress(f"{sent:,} tokens sent")

        await asyncio.gather(*(keep_asking() for _ in range(concurrency_of(pool))))
    return sent


def concurrency_of(pool: Pool) -> int:
    """How many prompts of a flood run at once."""
    fitting = int(_RUNNING_SHARE * pool.num_tokens / _longest_prompt(pool))
    return max(1, min(_CONCURRENCY, fitting))


def _longest_prompt(pool: Pool) -> int:
    """In tokens of whole blocks: a word is a token, or some more, and a template stands around."""
    return math.ceil(1.2 * _PROMPT_WORDS / pool.block_size) * pool.block_size
