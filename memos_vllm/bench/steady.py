"""Whether memory chats stay as quick as they were while other traffic floods the KV pool."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from memos_vllm.bench.flatness import Flatness, flatness
from memos_vllm.bench.flood import read_pool
from memos_vllm.bench.metrics import read_metrics
from memos_vllm.bench.progress import Report
from memos_vllm.bench.streams import Timed, timed_chat
from memos_vllm.bench.traffic import Filler

# Of a flood's prompts. A random word is about four tokens.
_PROMPT_WORDS = 256
_WORD_TOKENS = 4
_QUESTION_WORDS = 6
_ANSWER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class SteadyChat:
    """One memory chat.

    Attributes:
        at_seconds: when it was asked, from the first one's start.
        source: where the server had its memory from, as it reports itself.
        flood_seconds: the TTFT of each unrelated prompt just before it; empty without a flood.
    """

    at_seconds: float
    ttft_seconds: float
    cached_tokens: int
    source: str
    flood_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SteadyRun:
    """Memory chats in their order.

    Attributes:
        pools_flooded: prompt tokens of the whole run, as a multiple of the pool.
    """

    chats: tuple[SteadyChat, ...]
    pools_flooded: float

    @property
    def sources(self) -> Counter[str]:
        return Counter(chat.source for chat in self.chats)

    @property
    def all_chats(self) -> Flatness:
        return flatness([chat.ttft_seconds for chat in self.chats])

    @property
    def after_floods(self) -> Flatness:
        """Of those chats alone that came right behind a flood."""
        return flatness([chat.ttft_seconds for chat in self.chats if chat.flood_seconds])

    @property
    def machine(self) -> Flatness:
        """Of the unrelated prompts, one median a flood: where this rises, the machine slowed."""
        return flatness(
            [statistics.median(chat.flood_seconds) for chat in self.chats if chat.flood_seconds]
        )


def as_user(text: str) -> list[dict[str, str]]:
    """A question as the only message."""
    return [{"role": "user", "content": text}]


def chat_through_floods(
    ask: Callable[[str], Timed],
    ask_unrelated: Callable[[str], Timed],
    *,
    chats: int,
    flood_prompts: int,
    flood_every: int,
    seed: int,
    report: Report = lambda _share, _message: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[SteadyChat, ...]:
    """Ask a cube again and again, with a flood before every `flood_every`-th question.

    One request at a time, and no text twice: what is timed is what the flood did to the pool, not
    the queue in front of it.
    """
    questions, flood = Filler(seed, "questions"), Filler(seed, "flood")
    began = clock()
    done = []
    for number in range(chats):
        prompts = flood_prompts if number % flood_every == 0 else 0
        flood_seconds = tuple(
            ask_unrelated(flood.words(_PROMPT_WORDS)).ttft_seconds for _ in range(prompts)
        )
        at_seconds = clock() - began
        sample = ask(f"Regarding {questions.words(_QUESTION_WORDS)}: what is the motto?")
        source = str(sample.activation.get("source", ""))
        done.append(
            SteadyChat(at_seconds, sample.ttft_seconds, sample.cached_tokens, source, flood_seconds)
        )
        report(
            (number + 1) / chats,
            f"chat {number + 1} of {chats} through floods: {sample.ttft_seconds:.3f} s, "
            f"{source or 'prefix cache'}",
        )
    return tuple(done)


def run_steady(
    client: httpx.Client,
    *,
    model: str,
    body: Mapping[str, object],
    compose: Callable[[str], Sequence[Mapping[str, str]]] = as_user,
    chats: int = 200,
    flood_pools: float = 1.1,
    flood_every: int = 1,
    seed: int = 0,
    report: Report = lambda _share, _message: None,
) -> SteadyRun:
    """Chat about one memory through floods of unrelated prompts.

    Args:
        client: of the server.
        model: the name under which it serves.
        body: of the memory chats besides their messages: `memcube_id`, or a plain server's salt.
        compose: the messages of a question; for a plain server with the memory's text in them.
        flood_pools: each flood's size in KV pools. Below 1 a plain prefix cache keeps the memory
            too, since each chat makes it the last used.
    Raises:
        MemosError: the server does not answer, or refuses a chat.
    """
    url = str(client.base_url).rstrip("/")
    pool = read_pool(url)
    flood_prompts = round(flood_pools * pool.num_tokens / (_PROMPT_WORDS * _WORD_TOKENS)) + 1
    before = read_metrics(url).total("vllm:prompt_tokens_total")
    done = chat_through_floods(
        lambda question: timed_chat(
            client, compose(question), model=model, max_tokens=_ANSWER_TOKENS, **body
        ),
        lambda text: timed_chat(client, as_user(text), model=model, max_tokens=1),
        chats=chats,
        flood_prompts=flood_prompts,
        flood_every=flood_every,
        seed=seed,
        report=report,
    )
    sent = read_metrics(url).total("vllm:prompt_tokens_total") - before
    return SteadyRun(done, pools_flooded=sent / pool.num_tokens)
