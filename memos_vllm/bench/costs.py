"""What memory costs those who do not use it: plain chats beside the plugin, and beside a save."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import httpx

from memos_vllm.bench.fleet import SERVED, Fleet
from memos_vllm.bench.measure import cube_id
from memos_vllm.bench.metrics import read_metrics
from memos_vllm.bench.prompts import Memory, Prompts
from memos_vllm.bench.record import Pair
from memos_vllm.bench.situations import Server
from memos_vllm.bench.streams import Timed, timed_chat
from memos_vllm.client import MOS

T = TypeVar("T")

_STORY_TOKENS = 200
_STORY_ANSWER_TOKENS = 48
# Four seconds or so of somebody else's answer, within which a save begins and ends.
_OTHER_TOKENS = 96
# A save is over before what follows is measured.
_SAVED_SECONDS = 1.0
_SATURATING_CHATS = 24
_SATURATING_ANSWER_TOKENS = 256
_WAIT = "memos_chat_wait_seconds"
# Quantile -> seconds.
_PROMISED_WAITS = {0.5: 0.006, 0.99: 0.025}


def plain_traffic(fleet: Fleet, prompts: Prompts, *, rounds: int) -> Iterator[Pair]:
    """Chats without memory, on the server with the plugin and on plain vLLM, in turn."""
    for number in range(rounds):
        story = _story(prompts)

        def ask(server: Server, story: list[dict[str, str]] = story) -> Timed:
            return timed_chat(
                fleet.client(server),
                story,
                model=SERVED,
                max_tokens=_STORY_ANSWER_TOKENS,
                ignore_eos=True,
            )

        plain, plugin = _in_turn(number, lambda: ask(Server.PLAIN), lambda: ask(Server.MEMOS))
        yield Pair(
            "plain chat with the plugin, first token",
            "plain vLLM",
            "s",
            plugin.ttft_seconds,
            plain.ttft_seconds,
        )
        yield Pair(
            "plain chat with the plugin, each token",
            "plain vLLM",
            "s",
            _seconds_a_token(plugin),
            _seconds_a_token(plain),
        )


def control_plane(
    fleet: Fleet, prompts: Prompts, memory: Memory, *, memory_tokens: int, chats: int
) -> Iterator[Pair]:
    """A chat with a resident cube, beside one that brings the same prompt by hand, equally warm.

    One and the same server computes both alike; what is left is to find out who asks, what the
    cube holds and what to sign. Of that the server itself says how long it waited for its actors:
    at the far end the two chats differ by noise.

    Args:
        memory: what the cube of this length holds.
    """
    client = fleet.client(Server.MEMOS)
    salt = prompts.salt()

    def by_cube() -> Timed:
        body = {"memcube_id": cube_id(memory_tokens)}
        return timed_chat(client, prompts.question(32), model=SERVED, max_tokens=1, **body)

    def by_hand() -> Timed:
        messages = prompts.with_memory(prompts.question(32), memory)
        return timed_chat(client, messages, model=SERVED, max_tokens=1, cache_salt=salt)

    for ask in (by_cube, by_hand):
        ask()
    before = read_metrics(fleet.url(Server.MEMOS))
    for number in range(chats):
        cube, hand = _in_turn(number, by_cube, by_hand)
        yield Pair(
            "chat that names a cube, first token",
            "the same prompt by hand, same server",
            "s",
            cube.ttft_seconds,
            hand.ttft_seconds,
        )
    after = read_metrics(fleet.url(Server.MEMOS))
    for share, promised in _PROMISED_WAITS.items():
        waited = after.quantile(_WAIT, share, since=before)
        if not math.isnan(waited):
            name = f"chat that names a cube waits for the control plane, p{share * 100:.0f}"
            yield Pair(name, "promised", "s", waited, promised)


def saving(fleet: Fleet, prompts: Prompts, *, memory_tokens: int, rounds: int) -> Iterator[Pair]:
    """A chat that computes its memory and saves it, beside one that only computes it.

    Meanwhile another, plain chat streams: what saving costs it shows in its tokens a second.
    """
    client = fleet.client(Server.MEMOS)

    def ask(*, keep: bool) -> Timed:
        # An edit of the first note: nothing of the memory is cached, here or in the store.
        cube.update_memory(first.id, text=f"{first.text}\n\nEdition {prompts.filler(2)}.")
        return timed_chat(
            client,
            prompts.question(32),
            model=SERVED,
            memcube_id=cube_id(memory_tokens),
            memos={"activation": keep},
        )

    def beside_another(*, keep: bool) -> float:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(
                timed_chat,
                client,
                _story(prompts),
                model=SERVED,
                max_tokens=_OTHER_TOKENS,
                ignore_eos=True,
            )
            time.sleep(0.5)
            ask(keep=keep)
            streamed = other.result()
        return 1.0 / _seconds_a_token(streamed)

    with MOS(fleet.url(Server.MEMOS)) as mos:
        cube = mos.cube(cube_id(memory_tokens))
        first = next(iter(cube.memories()))
        for number in range(rounds):
            kept, computed = _in_turn(number, lambda: ask(keep=True), lambda: ask(keep=False))
            yield Pair(
                "chat that computes and keeps its memory, first token",
                "one that only computes it",
                "s",
                kept.ttft_seconds,
                computed.ttft_seconds,
            )
            time.sleep(_SAVED_SECONDS)
            beside_save, beside_none = _in_turn(
                number, lambda: beside_another(keep=True), lambda: beside_another(keep=False)
            )
            yield Pair(
                "another stream beside a save, tokens a second",
                "beside one that only computes",
                "/s",
                beside_save,
                beside_none,
            )
            time.sleep(_SAVED_SECONDS)
        cube.update_memory(first.id, text=first.text)
        cube.promote("all", to="activation", wait=True)


def preemptions(fleet: Fleet, *, seed: int) -> Iterator[Pair]:
    """How often plain chats that saturate the pool are preempted, with the plugin and without."""
    counts = {}
    for server in (Server.PLAIN, Server.MEMOS):
        client = fleet.client(server)
        before = _preempted(fleet.url(server))
        # The same chats for both.
        drawn = random.Random(seed)
        stories = [
            " ".join(f"{drawn.randrange(10**6):06}" for _ in range(_STORY_TOKENS))
            for _ in range(_SATURATING_CHATS)
        ]

        def ask(text: str, client: httpx.Client = client) -> Timed:
            return timed_chat(
                client,
                [{"role": "user", "content": text}],
                model=SERVED,
                max_tokens=_SATURATING_ANSWER_TOKENS,
                ignore_eos=True,
            )

        with ThreadPoolExecutor(_SATURATING_CHATS) as pool:
            list(pool.map(ask, stories))
        counts[server] = _preempted(fleet.url(server)) - before
    yield Pair(
        f"preemptions of {_SATURATING_CHATS} plain chats at once, with the plugin",
        "plain vLLM",
        "",
        counts[Server.MEMOS],
        counts[Server.PLAIN],
    )


def _story(prompts: Prompts) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell a story about {prompts.filler(40)}."}]


def _preempted(url: str) -> float:
    return read_metrics(url).total("vllm:num_preemptions_total")


def _seconds_a_token(reply: Timed) -> float:
    return (reply.total_seconds - reply.ttft_seconds) / max(1, reply.completion_tokens - 1)


def _in_turn(number: int, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """Both, in an order that alternates from round to round."""
    if number % 2 == 0:
        return first(), second()
    late = second()
    return first(), late
