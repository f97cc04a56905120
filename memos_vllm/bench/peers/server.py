"""A peer that runs: a plain vLLM server with the peer's connector, and the peer's own store."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from memos_vllm.errors import MemosError
from memos_vllm.process import ServerFailed, ServerProcess

_POLL_SECONDS = 0.05
_BY_SOURCE = re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', re.M)


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Where a vLLM server had the tokens of its prompts from, as it counts them itself.

    Attributes:
        computed: prefilled.
        own_cache: found in vLLM's own prefix cache.
        store: loaded through the connector.
    """

    computed: int
    own_cache: int
    store: int

    def since(self, before: PromptTokens) -> PromptTokens:
        """What was added after `before` was read."""
        return PromptTokens(
            self.computed - before.computed,
            self.own_cache - before.own_cache,
            self.store - before.store,
        )

    def hit_fault(self, *, at_least: int) -> str | None:
        """Why the request that was answered meanwhile was no hit in the peer's store.

        Args:
            at_least: tokens that a hit loads.
        """
        if self.own_cache:
            return f"vLLM's own prefix cache gave {self.own_cache} of its tokens"
        if self.store < at_least:
            return f"the store gave {self.store} tokens, expected at least {at_least}"
        return None


def parse_prompt_tokens(metrics: str) -> PromptTokens:
    """Find them in the /metrics page of a vLLM server.

    Raises:
        MemosError: the page does not tell.
    """
    found: dict[str, int] = {}
    for source, value in _BY_SOURCE.findall(metrics):
        found[source] = found.get(source, 0) + int(float(value))
    try:
        return PromptTokens(
            computed=found["local_compute"],
            own_cache=found["local_cache_hit"],
            store=found["external_kv_transfer"],
        )
    except KeyError as error:
        raise MemosError(
            f"the server's /metrics do not count prompt tokens from {error}; "
            "this harness knows vLLM 0.32"
        ) from None


class PeerServer:
    """One peer's processes, started and stopped together.

    Args:
        name: the peer's.
        engine: the vLLM server; it needs VLLM_SERVER_DEV_MODE=1.
        store: the server process that holds the peer's cache, where it has one.
        count_store_tokens: tokens that the peer itself says to have given, since it started.
    """

    def __init__(
        self,
        name: str,
        *,
        engine: ServerProcess,
        store: ServerProcess | None,
        count_store_tokens: Callable[[PeerServer], int],
    ) -> None:
        self.name = name
        self.engine = engine
        self.store = store
        self._count_store_tokens = count_store_tokens

    @property
    def url(self) -> str:
        """Of the vLLM server."""
        return self.engine.url

    @property
    def processes(self) -> tuple[ServerProcess, ...]:
        """vLLM first: it is ended before its store, and stopped before it."""
        return (self.engine,) if self.store is None else (self.engine, self.store)

    def start(self, *, timeout_seconds: float = 240.0) -> Self:
        """Start the store, then vLLM.

        Raises:
            ServerFailed: one of them was not ready in time; nothing of either is left.
        """
        try:
            for one in reversed(self.processes):
                one.start(timeout_seconds=timeout_seconds)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End vLLM, then the store."""
        with contextlib.ExitStack() as ending:
            # One that does not end must not keep the other alive.
            for one in reversed(self.processes):
                ending.callback(one.stop)

    def kill(self) -> None:
        """Kill -9 both."""
        with contextlib.ExitStack() as ending:
            for one in reversed(self.processes):
                ending.callback(one.kill)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes meanwhile; vLLM never runs without its store."""
        with contextlib.ExitStack() as stopped:
            # vLLM goes on last, when its store answers again.
            for one in self.processes:
                stopped.enter_context(one.paused())
            yield

    def pids(self) -> list[int]:
        """Of all its processes, the store's included: its memory is the peer's."""
        return [pid for one in self.processes for pid in one.pids()]

    def forget_prefixes(self, *, timeout_seconds: float = 60.0) -> None:
        """Empty vLLM's own prefix cache; the peer's store keeps what it has.

        Without this, a second request hits vLLM's own cache and tells nothing about the peer. vLLM
        refuses while blocks are being saved, so afterwards the last request's save is done.

        Raises:
            ServerFailed: it still refused in the end.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._client(self.engine) as client:
            while True:
                reply = client.post("/reset_prefix_cache")
                if reply.status_code != httpx.codes.OK:
                    raise ServerFailed(
                        f"{self.name}: vLLM answered {reply.status_code} when asked to forget its "
                        "prefixes; it must be started with VLLM_SERVER_DEV_MODE=1"
                    )
                if reply.json()["success"]:
                    return
                if time.monotonic() >= deadline:
                    raise ServerFailed(f"{self.name}: vLLM kept refusing to forget its prefixes")
                time.sleep(_POLL_SECONDS)

    def prompt_tokens(self) -> PromptTokens:
        """vLLM's count, since it started."""
        with self._client(self.engine) as client:
            return parse_prompt_tokens(client.get("/metrics").text)

    def store_tokens(self) -> int:
        """The peer's own count of tokens that it gave, since it started: a second witness."""
        return self._count_store_tokens(self)

    def store_metrics(self) -> str:
        """The /metrics page of the store's process."""
        assert self.store is not None, "this peer has no process of its own"
        with self._client(self.store) as client:
            return client.get("/metrics").text

    def _client(self, server: ServerProcess) -> httpx.Client:
        return httpx.Client(base_url=server.url, timeout=30.0, trust_env=False)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
