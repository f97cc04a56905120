"""Times to first token, measured as a client sees them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memos_vllm.client import MOS
from memos_vllm.client.cube import Cube
from memos_vllm.client.stream import ChatStream


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
