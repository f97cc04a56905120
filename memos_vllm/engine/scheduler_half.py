"""The half of the connector that runs beside vLLM's scheduler.

It looks up, keeps and plans; it never touches KV. Every hook may be called with whatever a
client sent, so each guards itself: a hook that raised would end the engine.
"""

from __future__ import annotations

import enum
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from memos_vllm.activation.prefix import RENDERER_VERSION
from memos_vllm.activation.residency import Residency
from memos_vllm.activation.store import ArtifactManifest, ArtifactStore, PrefixIdentity
from memos_vllm.engine.saves import PrefixSaves
from memos_vllm.engine.stats import MemosStats, StatsCollector
from memos_vllm.engine.ticket import TICKET_KEY, Ticket, TicketVerifier
from memos_vllm.engine.transfer import (
    LoadJob,
    LoadReport,
    SaveReport,
    StepMetadata,
    StepReport,
)
from memos_vllm.errors import TicketRejected

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Counting resident blocks takes 0.2 ms for fifty cubes: too much for every step.
_GAUGE_INTERVAL_SECONDS = 1.0


class Source(enum.StrEnum):
    """Where a request's memory KV came from; the words of the HTTP contract."""

    RESIDENT = "resident"
    STORE = "store"
    COMPUTED = "computed"


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What the scheduler half needs to know of the engine.

    Attributes:
        block_size: tokens per KV block.
        step_blocks: most blocks that one engine step can allocate.
        total_layers: attention layers of the whole model, over all pipeline ranks.
        total_kv_heads: KV heads of the whole model, over all tensor-parallel ranks.
        num_shards: worker ranks that hold distinct KV.
        unsupported: why KV cannot be moved in this engine, or None when it can.
    """

    block_size: int
    step_blocks: int
    total_layers: int
    total_kv_heads: int
    num_shards: int
    unsupported: str | None = None


@dataclass(slots=True)
class _MemoryRequest:
    """A request that carries a valid ticket."""

    request: Request
    ticket: Ticket
    wanted_tokens: int
    # What the prefix cache had when the request first met it, for the reply.
    first_local_tokens: int | None = None
    # What it had at the latest lookup; differs after a preemption.
    local_tokens: int = 0
    loaded_tokens: int = 0
    loading: LoadJob | None = None
    load_failed: bool = False
    settled: bool = False


def _never_raises(default: Callable[[], Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A failing hook logs, counts and answers `default()`, as if there were no memory."""

    def decorate(hook: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(hook)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return hook(*args, **kwargs)
            except Exception:
                logger.exception("memos: scheduler hook %s failed", hook.__name__)
                half = args[0]
                assert isinstance(half, SchedulerHalf)
                half.stats.count("hook_failures", hook.__name__)
                fallback: T = default()
                return fallback

        return guarded

    return decorate


def _nothing() -> None:
    return None


class SchedulerHalf:
    """Finds, keeps and plans memory KV for the scheduler.

    Args:
        shape: the engine's block size and model shape.
        store: the artifact store; this half is its only committer.
        fingerprint: of the served model.
        numerics: numerics class of this engine.
        verifier: takes tickets.
        residency: decides which blocks stay.
        allow_portable: also load artifacts of other numerics classes.
    """

    def __init__(
        self,
        *,
        shape: EngineShape,
        store: ArtifactStore,
        fingerprint: str,
        numerics: str,
        verifier: TicketVerifier,
        residency: Residency,
        allow_portable: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = StatsCollector()
        self._shape = shape
        self._store = store
        self._fingerprint = fingerprint
        self._numerics = numerics
        self._verifier = verifier
        self._residency = residency
        self._allow_portable = allow_portable
        self._clock = clock
        self._manager: KVCacheManager | None = None
        self._requests: dict[str, _MemoryRequest] = {}
        self._loads: dict[str, LoadJob] = {}
        self._planned = StepMetadata()
        self._next_gauges_at = 0.0
        self._housekeeper = ThreadPoolExecutor(1, thread_name_prefix="memos-store")
        # Which resident scopes were erased, as the latest look at the store finds them.
        self._look: Future[frozenset[str]] | None = None
        self._saves = PrefixSaves(
            store,
            total_layers=shape.total_layers,
            total_kv_heads=shape.total_kv_heads,
            num_shards=shape.num_shards,
            committer=self._housekeeper,
            count=lambda outcome: self.stats.count("saves", outcome),
            clock=self._clock,
        )

    def bind(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._residency.bind(manager.block_pool)
        self._saves.bind(manager.block_pool)

    # --- a request's life -------------------------------------------------------------

    @_never_raises(_nothing)
    def on_new_request(self, request: Request) -> None:
        """Take the request's ticket; drop whatever else it carries."""
        params = request.kv_transfer_params
        if params is None:
            return
        # Nothing that a client sent may reach vLLM's own handling, which expects a dict, nor
        # the workers and their crash dumps.
        request.kv_transfer_params = None
        if request.sampling_params is not None and request.sampling_params.extra_args:
            request.sampling_params.extra_args.pop("kv_transfer_params", None)
        if not isinstance(params, dict) or TICKET_KEY not in params:
            self.stats.count("params_dropped", "unknown")
            return
        try:
            ticket = self._verifier.take(
                params[TICKET_KEY], request_id=request.request_id, cache_salt=request.cache_salt
            )
        except TicketRejected as error:
            self.stats.count("tickets_rejected", str(error))
            logger.warning("memos: a ticket was rejected: %s", error)
            return
        self._requests[request.request_id] = _MemoryRequest(
            request, ticket, wanted_tokens=self._wanted_tokens(request, ticket)
        )

    @_never_raises(lambda: (0, False))
    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many further tokens the store can supply; None to ask again soon.

        Plans nothing, since vLLM may call it several times.
        """
        memory = self._requests.get(request.request_id)
        if memory is None:
            return 0, False
        found = self._find(memory)
        further = 0 if found is None else max(0, found[1] - num_computed_tokens)
        if found and further and self._is_loading(found[0].key, memory.ticket.salt_digest):
            # Another request loads the same blocks: share them instead of a second copy.
            return None, False
        memory.local_tokens = num_computed_tokens
        # Not while it waits for another's load: what that brought was there before it began.
        if memory.first_local_tokens is None:
            memory.first_local_tokens = num_computed_tokens
        return further, further > 0

    @_never_raises(_nothing)
    def on_allocated(self, request: Request, num_external_tokens: int) -> None:
        """Plan the load that `match` promised, now that it has blocks to go to."""
        memory = self._requests.get(request.request_id)
        if memory is None or num_external_tokens == 0:
            return
        # The request now waits until its load is reported, so one is planned whatever happens:
        # the worker reports a load of nothing as failed, and vLLM computes the tokens.
        job = self._load_job(memory, num_external_tokens) or LoadJob(
            request_id=request.request_id,
            artifact="",
            identity=self._identity(memory.ticket.scope),
            first_token=memory.local_tokens,
            num_tokens=num_external_tokens,
            block_ids=(),
        )
        memory.loading = job
        self._loads[request.request_id] = job
        self._planned.loads.append(job)
        # A load's blocks are outside the step's token budget, which the horizon follows.
        self._keep_resident()

    def plan_step(self, output: SchedulerOutput) -> StepMetadata:
        """The work that the workers start in this step; always all that is planned."""
        self._finish_commits()
        for request_id in output.num_scheduled_tokens:
            memory = self._requests.get(request_id)
            if memory is not None and not memory.settled:
                # vLLM schedules a request only when its load has ended on every rank.
                memory.loading = None
                self._settle_when_computed(memory)
        self._keep_resident()
        planned, self._planned = self._planned, StepMetadata()
        planned.computes_nothing = not output.num_scheduled_tokens
        return planned

    def on_report(self, report: StepReport | None) -> None:
        """Take note of the loads and saves that ended."""
        if report is None:
            return
        for load in report.loads:
            self._on_load(load)
        for save in report.saves:
            self._on_save(save)

    @_never_raises(_nothing)
    def on_finished(self, request: Request) -> dict[str, Any] | None:
        """The request ended; its blocks are still there.

        Returns:
            What the connector did for it, for the reply; None for plain requests.
        """
        memory = self._requests.pop(request.request_id, None)
        if memory is None:
            return None
        if not memory.settled:
            self._settle_when_computed(memory)
        if memory.ticket.session is not None:
            self._keep_session(memory)
        self._end_load(request.request_id)
        source, cached = self._outcome(memory)
        head = memory.ticket.head_tokens
        self.stats.count("requests", source)
        self.stats.count("tokens", source, by=cached)
        self.stats.count("tokens", Source.COMPUTED, by=head - cached)
        return {
            TICKET_KEY: {
                "tokens": head,
                "cached_tokens": cached,
                "source": str(source),
                "kept_tokens": memory.wanted_tokens if self._shape.unsupported is None else 0,
                "unsupported": self._shape.unsupported,
            }
        }

    # --- the rest of the engine's life --------------------------------------------------

    @property
    def has_pending_work(self) -> bool:
        """Whether the engine must keep stepping so that a save can end and be counted."""
        return self._saves.under_way

    @_never_raises(_nothing)
    def take_stats(self) -> MemosStats | None:
        now = self._clock()
        if not self.stats.has_news and now < self._next_gauges_at:
            return None
        self._next_gauges_at = now + _GAUGE_INTERVAL_SECONDS
        self._follow_other_processes()
        moves, self._residency.moves = self._residency.moves, 0
        if moves:
            self.stats.count("residency_moves", by=moves)
        usage = self._store.stats()
        size = self._shape.block_size
        by_scope = self._residency.resident_by_scope()
        gauges = {
            "resident_blocks": float(self._residency.resident_blocks()),
            "residency_budget_blocks": float(self._residency.budget_blocks),
            "store_artifacts": float(usage.num_artifacts),
            "store_bytes": float(usage.bytes_used),
        }
        return self.stats.take(gauges, {s: blocks * size for s, blocks in by_scope.items()})

    def _follow_other_processes(self) -> None:
        """Notice what they added to the store, and what they erased."""
        if self._look is not None and self._look.done():
            if self._look.exception() is None:
                for scope in self._look.result():
                    self._residency.erase_scope(scope)
            self._look = None
        if self._look is None:
            self._look = self._housekeeper.submit(self._look_at_store, self._residency.scopes)

    def _look_at_store(self, scopes: frozenset[str]) -> frozenset[str]:
        self._store.refresh()
        return self._store.erased_among(scopes)

    def reset(self) -> bool:
        """vLLM dropped its prefix cache, and ours with it. The store keeps its artifacts."""
        self._residency.clear()
        return True

    def shutdown(self) -> None:
        self._housekeeper.shutdown(wait=True)
        self._finish_commits()

    # --- lookup -----------------------------------------------------------------------

    def _wanted_tokens(self, request: Request, ticket: Ticket) -> int:
        """How much of the head can be reused: whole blocks, and at least one token is left
        for the model to compute."""
        reusable: int = min(ticket.head_tokens, request.num_prompt_tokens - 1)
        return max(0, reusable) // self._shape.block_size * self._shape.block_size

    def _identity(self, scope: str) -> PrefixIdentity:
        return PrefixIdentity(
            scope=scope,
            fingerprint=self._fingerprint,
            numerics=self._numerics,
            renderer_version=RENDERER_VERSION,
        )

    def _find(self, memory: _MemoryRequest) -> tuple[ArtifactManifest, int] | None:
        """The stored artifact that covers most of the wanted tokens, in whole blocks."""
        request = memory.request
        if (
            self._shape.unsupported is not None
            or memory.load_failed
            or memory.wanted_tokens == 0
            # An adapter changes the KV; the artifacts were baked without one.
            or request.lora_request is not None
            or request.prompt_token_ids is None
            or request.prompt_embeds is not None
        ):
            return None
        identity = self._identity(memory.ticket.scope)
        wanted = request.prompt_token_ids[: memory.wanted_tokens]
        found = self._store.lookup(identity, wanted, any_numerics=self._allow_portable)
        # Another process may have imported it since the last look; a look costs one stat.
        if found is None and self._store.refresh():
            found = self._store.lookup(identity, wanted, any_numerics=self._allow_portable)
        if found is None:
            return None
        size = self._shape.block_size
        return found.manifest, found.num_tokens // size * size

    def _is_loading(self, key: str, salt_digest: str) -> bool:
        return any(
            job.artifact == key and self._requests[request_id].ticket.salt_digest == salt_digest
            for request_id, job in self._loads.items()
            if request_id in self._requests
        )

    def _blocks(self, request_id: str) -> list[Any]:
        assert self._manager is not None
        return list(self._manager.get_blocks(request_id).blocks[0])

    @_never_raises(_nothing)
    def _load_job(self, memory: _MemoryRequest, num_tokens: int) -> LoadJob | None:
        """The load of what `match` promised; None when it is no longer there.

        The store may have changed since: another artifact may now share the longest prefix,
        which is shorter than the one promised.
        """
        first = memory.local_tokens
        found = self._find(memory)
        if found is None or found[1] < first + num_tokens:
            return None
        blocks, size = self._blocks(memory.request.request_id), self._shape.block_size
        job = LoadJob(
            request_id=memory.request.request_id,
            artifact=found[0].key,
            identity=self._identity(memory.ticket.scope),
            first_token=first,
            num_tokens=num_tokens,
            block_ids=tuple(
                block.block_id for block in blocks[first // size : -(-(first + num_tokens) // size)]
            ),
        )
        self._store.pin(job.artifact)
        return job

    @_never_raises(_nothing)
    def _keep_resident(self) -> None:
        self._residency.keep()

    # --- once the head is computed ------------------------------------------------------

    @_never_raises(_nothing)
    def _settle_when_computed(self, memory: _MemoryRequest) -> None:
        """Keep the head resident, and in the store, once an earlier step has computed it.

        `num_computed_tokens` moves when a step is scheduled. The workers run steps in order,
        so work that starts with this step sees the KV of every earlier one.
        """
        request = memory.request
        if self._shape.unsupported is not None or memory.wanted_tokens == 0:
            memory.settled = True
            return
        if request.num_computed_tokens < memory.wanted_tokens or memory.loading is not None:
            return
        memory.settled = True
        blocks = self._blocks(request.request_id)
        head_blocks = blocks[: memory.wanted_tokens // self._shape.block_size]
        tokens = tuple(request.prompt_token_ids or ())[: memory.wanted_tokens]
        lora = request.lora_request.lora_name if request.lora_request else None
        self._residency.remember(
            (memory.ticket.salt_digest, lora, hash(tokens)), memory.ticket.scope, head_blocks
        )
        if memory.ticket.save and lora is None and request.prompt_embeds is None:
            self._plan_save(memory, tokens, head_blocks)

    @_never_raises(_nothing)
    def _keep_session(self, memory: _MemoryRequest) -> None:
        """Keep a conversation's blocks resident for its next turn."""
        if self._shape.unsupported is None and memory.request.num_computed_tokens:
            self._residency.remember(
                (memory.ticket.salt_digest, "session", memory.ticket.session),
                memory.ticket.scope,
                self._blocks(memory.request.request_id),
            )

    def _plan_save(
        self, memory: _MemoryRequest, tokens: tuple[int, ...], blocks: list[Any]
    ) -> None:
        job = self._saves.plan(
            self._identity(memory.ticket.scope), tokens, blocks, retry=memory.ticket.retry_save
        )
        if job is not None:
            self._planned.saves.append(job)

    # --- reports ----------------------------------------------------------------------

    @_never_raises(_nothing)
    def _on_load(self, report: LoadReport) -> None:
        memory = self._requests.get(report.request_id)
        job = self._end_load(report.request_id)
        if report.error is None:
            self.stats.count("loads", "ok")
            self.stats.count("load_bytes", by=report.num_bytes)
            self.stats.count("load_seconds", by=report.seconds)
            # The reply tells of the first admission: a load after a preemption is not counted.
            if memory is not None and job is not None and not memory.settled:
                memory.loaded_tokens = job.num_tokens
            self._housekeeper.submit(self._store.mark_used, report.artifact)
            return
        if memory is not None:
            memory.load_failed = True
            memory.loaded_tokens = 0
        self.stats.count("loads", "unusable" if report.unusable else "failed")
        logger.warning(
            "memos: artifact %s could not be loaded and is recomputed: %s",
            report.artifact or "(gone)",
            report.error,
        )
        if report.unusable:
            self._store.forget(report.artifact)
            # Right here, though it costs milliseconds: the file that the coming save writes has
            # the same name, being of the same content, and must not be the one set aside.
            self._store.quarantine(report.artifact, reason=report.error)

    def _end_load(self, request_id: str) -> LoadJob | None:
        job = self._loads.pop(request_id, None)
        if job is not None and job.artifact:
            self._unpin(job.artifact)
        return job

    @_never_raises(_nothing)
    def _unpin(self, artifact: str) -> None:
        self._store.unpin(artifact)

    @_never_raises(_nothing)
    def _on_save(self, report: SaveReport) -> None:
        self.stats.count("save_seconds", by=report.seconds)
        self._saves.on_report(report)

    @_never_raises(_nothing)
    def _finish_commits(self) -> None:
        self._saves.finish_commits()

    def _outcome(self, memory: _MemoryRequest) -> tuple[Source, int]:
        """Where the head's KV came from, and how many of its tokens were not computed."""
        head = memory.ticket.head_tokens
        local = memory.first_local_tokens or 0
        cached = min(head, local + memory.loaded_tokens)
        if memory.loaded_tokens:
            return Source.STORE, cached
        if memory.wanted_tokens and local >= memory.wanted_tokens:
            return Source.RESIDENT, cached
        return Source.COMPUTED, cached
