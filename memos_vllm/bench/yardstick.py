"""How often, and by how little, two runs of the same greedy prompts differ.

Plain vLLM does not always agree with itself: rounding depends on the shape of the batch, and a
near-tie between the two likeliest tokens then falls either way. This module compares runs, and
measures plain vLLM against itself on a running server:

    python -m tests.exactness.yardstick --url http://127.0.0.1:8000

It needs no memory and no plugin: cold, warm and concurrent are made with cache salts.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from memos_vllm.bench.streams import ChatFailed, expecting_answer

MAX_TOKENS = 64
REQUEST_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer.

    Attributes:
        top: for each token, the two likeliest tokens and their log probabilities.
        prompt_ids: the prompt as the engine saw it.
        cached_tokens: prompt tokens that were not computed; None where the server does not say.
        source: where memory came from; None for a chat without memory.
        memory_tokens: length of the memory at the prompt's head.
    """

    token_ids: tuple[int, ...]
    top: tuple[dict[int, float], ...]
    prompt_ids: tuple[int, ...]
    cached_tokens: int | None = None
    source: str | None = None
    memory_tokens: int = 0


Run = Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which two answers to one prompt differ.

    Attributes:
        gap_a, gap_b: how far each run's likeliest token was ahead of its second, in nats.
    """

    prompt: int
    position: int
    gap_a: float
    gap_b: float

    @property
    def gap(self) -> float:
        return max(self.gap_a, self.gap_b)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of the same prompts, or several such pairs put together.

    Attributes:
        shift: the largest change, between the runs, of the distance between the two likeliest
            tokens, over all positions that saw the same tokens before them.
    """

    num_prompts: int
    differences: tuple[Difference, ...]
    shift: float

    @property
    def rate(self) -> float:
        return len(self.differences) / self.num_prompts

    @property
    def gap(self) -> float:
        return max((difference.gap for difference in self.differences), default=0.0)

    def __str__(self) -> str:
        gaps = " ".join(f"{found.gap:.4g}" for found in self.differences)
        return (
            f"{len(self.differences)} of {self.num_prompts} prompts differ, gaps [{gaps}], "
            f"largest shift {self.shift:.4g}"
        )


def compare(a: Run, b: Run) -> Comparison:
    """Compare two runs prompt by prompt.

    Raises:
        ValueError: they did not answer the same prompts.
    """
    if [answer.prompt_ids for answer in a] != [answer.prompt_ids for answer in b]:
        raise ValueError("the runs answered different prompts")
    differences, shift = [], 0.0
    for prompt, (left, right) in enumerate(zip(a, b, strict=True)):
        position = first_difference(left.token_ids, right.token_ids)
        same_context = len(left.top) if position is None else position + 1
        shift = max(
            itertools.chain(
                [shift],
                map(_shift, left.top[:same_context], right.top[:same_context]),
            )
        )
        if position is not None:
            gaps = (_gap(run.top[position]) for run in (left, right))
            differences.append(Difference(prompt, position, *gaps))
    return Comparison(len(a), tuple(differences), shift)


def together(comparisons: Iterable[Comparison]) -> Comparison:
    """Several comparisons as one."""
    parts = list(comparisons)
    return Comparison(
        sum(part.num_prompts for part in parts),
        tuple(itertools.chain.from_iterable(part.differences for part in parts)),
        max(part.shift for part in parts),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None; a missing token differs."""
    for index, (left, right) in enumerate(itertools.zip_longest(a, b)):
        if left != right:
            return index
    return None


def _gap(top: dict[int, float]) -> float:
    first, second = sorted(top.values(), reverse=True)
    return first - second


def _shift(a: dict[int, float], b: dict[int, float]) -> float:
    """How far two tokens moved against each other; 0 where the runs name different ones."""
    if a.keys() != b.keys():
        return 0.0
    x, y = a
    return abs((a[x] - a[y]) - (b[x] - b[y]))


# --- asking a server ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat request; `fields` are those besides the messages."""

    messages: Sequence[dict[str, Any]]
    fields: dict[str, Any] = field(default_factory=dict)


class Asker:
    """Sends greedy chats of exactly `max_tokens` tokens and reads what came back.

    Args:
        client: its base URL is the server's; used from several threads.
    """

    def __init__(self, client: httpx.Client, *, max_tokens: int = MAX_TOKENS) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self.model = str(self._get("/v1/models")["data"][0]["id"])

    def ask(self, chat: Chat) -> Answer:
        reply = self._post(
            "/v1/chat/completions",
            {
                "model": self.model,
                "messages": list(chat.messages),
                "temperature": 0,
                "max_tokens": self._max_tokens,
                "ignore_eos": True,
                "logprobs": True,
                "top_logprobs": 2,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                **chat.fields,
            },
        )
        return read_answer(reply)

    def ask_each(self, chats: Sequence[Chat]) -> list[Answer]:
        """One after the other."""
        return [self.ask(chat) for chat in chats]

    def ask_all(self, chats: Sequence[Chat]) -> list[Answer]:
        """All at once; the answers in the order of the chats."""
        with ThreadPoolExecutor(len(chats)) as threads:
            return list(threads.map(self.ask, chats))

    def prefill(self, token_ids: Sequence[int], *, salt: str) -> None:
        """Bring a prompt into the prefix cache under a salt."""
        self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0,
                "cache_salt": salt,
            },
        )

    def _get(self, path: str) -> dict[str, Any]:
        with expecting_answer(path):
            reply = self._client.get(path)
        return _body_of(path, reply)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with expecting_answer(path):
            reply = self._client.post(path, json=body, timeout=REQUEST_SECONDS)
        return _body_of(path, reply)


def _body_of(path: str, reply: httpx.Response) -> dict[str, Any]:
    if reply.status_code != httpx.codes.OK:
        raise ChatFailed(f"{path} answered {reply.status_code}: {reply.text[:500]}")
    return dict(reply.json())


def read_answer(reply: dict[str, Any]) -> Answer:
    """The answer in a chat completion that was asked for by an `Asker`."""
    (choice,) = reply["choices"]
    details = reply["usage"].get("prompt_tokens_details") or {}
    activation = (reply.get("memos") or {}).get("activation") or {}
    return Answer(
        token_ids=tuple(choice["token_ids"]),
        top=tuple(
            {int(top["token"].removeprefix("token_id:")): top["logprob"] for top in entry}
            for entry in (token["top_logprobs"][:2] for token in choice["logprobs"]["content"])
        ),
        prompt_ids=tuple(reply["prompt_token_ids"]),
        cached_tokens=details.get("cached_tokens"),
        source=activation.get("source"),
        memory_tokens=activation.get("tokens", 0),
    )


def fresh_salt() -> str:
    """A cache salt under which nothing has been computed yet."""
    return secrets.token_hex(16)


def cold(conversations: Sequence[Sequence[dict[str, Any]]]) -> list[Chat]:
    """Plain chats of which nothing is cached."""
    return [Chat(messages, {"cache_salt": fresh_salt()}) for messages in conversations]


def warm(conversations: Sequence[Sequence[dict[str, Any]]], *, salt: str) -> list[Chat]:
    """Plain chats that find what was computed under a salt."""
    return [Chat(messages, {"cache_salt": salt}) for messages in conversations]


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Plain vLLM against itself: each pair of ways to answer the same prompts."""

    pairs: dict[str, Comparison]

    @property
    def noise(self) -> Comparison:
        return together(self.pairs.values())

    @property
    def rate(self) -> float:
        """The rate of the pair that differs most often."""
        return max(pair.rate for pair in self.pairs.values())


def measure(
    asker: Asker,
    conversations: Sequence[Sequence[dict[str, Any]]],
    *,
    head: Sequence[int] | None = None,
) -> tuple[Yardstick, dict[str, list[Answer]]]:
    """Answer the prompts cold, warm and concurrently, and compare the runs.

    Args:
        head: the tokens to make warm; by default what the prompts have in common.
    Returns:
        The yardstick and its runs by name.
    """
    runs = {"cold": asker.ask_each(cold(conversations))}
    if head is None:
        head = common_head([answer.prompt_ids for answer in runs["cold"]])
    salts = fresh_salt(), fresh_salt()
    for salt in salts:
        asker.prefill(head, salt=salt)
    runs["warm"] = asker.ask_each(warm(conversations, salt=salts[0]))
    runs["cold, concurrent"] = asker.ask_all(cold(conversations))
    runs["warm, concurrent"] = asker.ask_all(warm(conversations, salt=salts[1]))
    pairs = {
        f"{left} / {right}": compare(runs[left], runs[right])
        for left, right in itertools.combinations(runs, 2)
    }
    return Yardstick(pairs), runs


def common_head(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all prompts begin."""
    columns = zip(*prompts, strict=False)
    return [column[0] for column in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]


def chance_of(differences: int, prompts: int, *, noise: Comparison) -> float:
    """How likely so many differences, or more, are if they come from the same noise.

    One-sided Fisher test: of all prompts put together, the differences fall on either side by
    chance.
    """
    total = prompts + noise.num_prompts
    found = differences + len(noise.differences)
    most = min(prompts, found)
    ways = sum(
        math.comb(prompts, count) * math.comb(noise.num_prompts, found - count)
        for count in range(differences, most + 1)
    )
    return ways / math.comb(total, found)


def table(yardstick: Yardstick) -> str:
    """The yardstick as a Markdown table."""
    rows = [
        "| plain vLLM against itself | prompts that differ | largest top-2 gap there | "
        "largest shift of a gap |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {len(pair.differences)} of {pair.num_prompts} | {pair.gap:.4g} | "
        f"{pair.shift:.4g} |"
        for name, pair in yardstick.pairs.items()
    ]
    return "\n".join(rows)
