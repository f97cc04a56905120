"""Times to first token, measured as a client sees them, and the flood of other prompts."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from memos_vllm.client import MOS, AsyncMOS
from memos_vllm.client.cube import Cube
from memos_vllm.client.stream import ChatStream
from memos_vllm.errors import MemosError

_FLOOD_CONCURRENCY = 4
_FLOOD_PROMPT_WORDS = 1900
# Some more tokens than the pool holds, so that its last block is surely taken.
_FLOOD_SHARE = 1.1
_WORDS = (
    *("river", "stone", "garden", "winter", "letter", "market", "bridge", "window", "music"),
    *("paper", "silver", "forest", "morning", "engine", "harbour", "candle", "summer", "copper"),
    *("island", "pepper", "thunder", "velvet", "orange", "pocket", "shadow", "ladder", "kitten"),
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds until its first token, and what the server said it reused."""

    seconds: float
    cached_tokens: int
    source: str


@dataclass(slots=True)
class Measurement:
    """The samples of one way to give the model its memory."""

    name: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Pool:
    """The engine's KV pool."""

    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def ask_cube(cube: Cube, question: str, *, activation: bool = True) -> Sample:
    """Time a question to a cube; without activation its memory is prompt text, nothing cached."""
    return _timed(
        lambda options: cube.chat_stream(question, activation=activation, options=options)
    )


def ask_plainly(mos: MOS, messages: Sequence[Mapping[str, object]]) -> Sample:
    """Time a chat that names no cube."""
    return _timed(lambda options: mos.chat_stream(messages, options=options))


def _timed(ask: Callable[[Mapping[str, object]], ChatStream]) -> Sample:
    started = time.perf_counter()
    with ask({"temperature": 0, "max_tokens": 4}) as stream:
        next(stream, None)
        seconds = time.perf_counter() - started
        for _ in stream:
            pass
    if stream.memos is not None:
        use = stream.memos.activation
        return Sample(seconds, use.cached_tokens, use.source)
    details = stream.usage.get("prompt_tokens_details") or {}
    return Sample(seconds, int(details.get("cached_tokens") or 0), "-")


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

    Returns:
        The tokens that were sent.
    """
    wanted = pool.num_tokens * _FLOOD_SHARE
    words = random.Random(seed)
    sent = 0

    async with AsyncMOS(url) as mos:

        async def keep_asking() -> None:
            nonlocal sent
            while sent < wanted:
                # A word is a token here, and some; the reply says how many.
                sent += _FLOOD_PROMPT_WORDS
                reply = await mos.chat(
                    " ".join(words.choices(_WORDS, k=_FLOOD_PROMPT_WORDS)),
                    options={"max_tokens": 1, "temperature": 0},
                )
                sent += max(0, int(reply.usage.get("prompt_tokens", 0)) - _FLOOD_PROMPT_WORDS)
                progress(f"{sent:,} tokens sent")

        await asyncio.gather(*(keep_asking() for _ in range(_FLOOD_CONCURRENCY)))
    return sent
