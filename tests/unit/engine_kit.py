"""vLLM's real scheduler with our real connector and store, and a model of two floats a token.

`Engine` steps as vLLM's engine core does. Only the model runner is a stand-in: the KV that it
"computes" for a token is a function of all tokens up to it, so before each step it can tell
whether every page that attention would read holds what it should.
"""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from memos_vllm.activation.prefix import RENDERER_VERSION
from memos_vllm.activation.store import ArtifactStore, PrefixIdentity
from memos_vllm.engine import assembly
from memos_vllm.engine.connector import MemCubeConnector
from memos_vllm.engine.plugin import register
from memos_vllm.engine.scheduler_half import SchedulerHalf
from memos_vllm.engine.secrets import load_keys
from memos_vllm.engine.ticket import TICKET_KEY, TicketSigner
from memos_vllm.engine.worker_half import RankShape, WorkerHalf
from memos_vllm_kernels import KvPages, Packing

BLOCK = 16
LAYERS, HEADS, DIM = 2, 1, 32
SALT, SCOPE = "salt of cube a", "5c0be"
_PRIME = 999_983


@functools.cache
def model_config(folder: Path) -> ModelConfig:
    """A Llama of two layers that is never loaded."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 50_000,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2048,
    )


def tokens(count: int, *, seed: int = 1) -> list[int]:
    return [(seed * 7919 + 31 * index) % 49_999 for index in range(count)]


def kv_values(token_ids: Iterable[int]) -> list[float]:
    """What the model computes at each token: a number that every token before it changes."""
    state, values = 17, []
    for token in token_ids:
        state = (state * 31_337 + token + 1) % _PRIME
        values.append(float(state))
    return values


@dataclass
class FakeModel:
    """Pages of one float a token and layer, which it writes, reads and checks."""

    num_blocks: int
    pages: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.num_blocks, HEADS, BLOCK, 2 * DIM)
        self.pages = [torch.full(shape, float("nan")) for _ in range(LAYERS)]

    def run(self, token_ids: Sequence[int], blocks: Sequence[int], *, start: int, end: int) -> int:
        """Compute tokens [start, end) of a request, after checking all before; the next token."""
        values = np.array(kv_values(token_ids[:end]), dtype=np.float32)
        positions = np.arange(end)
        rows, offsets = np.array(blocks)[positions // BLOCK], positions % BLOCK
        for layer, page in enumerate(self.pages):
            numbers = page.numpy()
            found = numbers[rows[:start], 0, offsets[:start]][:, [0, -1]]
            right = found == (values[:start] + layer)[:, None]
            assert right.all(), f"attention would read wrong KV in layer {layer}: {found}"
            numbers[rows[start:], :, offsets[start:]] = (values[start:] + layer)[:, None, None]
        return int(values[-1]) % 49_999


class Engine:
    """The engine core's loop, step by step.

    Attributes:
        replies: request id -> the connector's report of a finished request.
        hold_loads, hold_saves: the worker's background threads seem not to get on.
        drop_loads: loads are lost on the way, as if the worker had died.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model_folder: Path,
        num_blocks: int = 64,
        batched_tokens: int = 256,
        max_seqs: int = 16,
        prefix_caching: bool = True,
        asynchronous: bool = False,
        **extra: Any,
    ) -> None:
        init_none_hash(sha256)
        register()
        self.config = VllmConfig(
            model_config=model_config(model_folder),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=prefix_caching),
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_seqs,
                max_num_batched_tokens=batched_tokens,
                max_model_len=2048,
                is_encoder_decoder=False,
                async_scheduling=asynchronous,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector="MemCubeConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"data_dir": str(folder), **extra},
                kv_load_failure_policy="recompute",
            ),
            load_config=LoadConfig(load_format="dummy"),
            device_config=DeviceConfig("cpu"),
        )
        self.config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
        )
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
        self.kv_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(names, spec)])
        kind = AsyncScheduler if asynchronous else Scheduler
        self.scheduler = kind(
            self.config,
            self.kv_config,
            StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=True,
        )
        self._depth = 2 if asynchronous else 1
        self.folder = folder
        self.model = FakeModel(num_blocks)
        self.store = assembly.open_store(self.config, budget=False)
        self.worker = WorkerHalf(
            store=self.store,
            rank=RankShape(0, 0),
            open_pages=lambda: KvPages.of(self.model.pages, Packing.PLAIN),
            block_size=BLOCK,
        )
        keys = load_keys(assembly.settings_of(self.config).secrets_dir)
        self.signer = TicketSigner(keys.ticket, ttl_seconds=300.0)
        self.hold_loads = self.hold_saves = self.drop_loads = False
        self.replies: dict[str, dict[str, Any]] = {}
        self.finished: dict[str, str] = {}
        self.counters: dict[str, float] = {}
        self._held_loads: list[Any] = []
        self._held_saves: list[Any] = []
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    @property
    def half(self) -> SchedulerHalf:
        connector = self.scheduler.connector
        assert isinstance(connector, MemCubeConnector)
        return connector._half

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def identity(self, scope: str = SCOPE) -> PrefixIdentity:
        return PrefixIdentity(
            scope,
            assembly.fingerprint_of(self.config).digest,
            assembly.numerics_of(self.config),
            RENDERER_VERSION,
        )

    def ticket(self, request_id: str, head: int, **changes: Any) -> dict[str, Any]:
        fields = {
            "request_id": request_id,
            "samples": 1,
            "scope": SCOPE,
            "cache_salt": SALT,
            "head_tokens": head,
            "save": True,
        }
        return {TICKET_KEY: self.signer.sign(**{**fields, **changes})}

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        head: int | None = None,
        params: Any = None,
        salt: str | None = None,
        max_tokens: int = 4,
        lora: LoRARequest | None = None,
        **ticket: Any,
    ) -> Request:
        """Queue a request; with `head` it carries a ticket for that many tokens of memory."""
        if head is not None:
            salt = SALT if salt is None else salt
            params = self.ticket(request_id, head, cache_salt=salt, **ticket)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sampling.extra_args = None if params is None else {"kv_transfer_params": params}
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            cache_salt=salt,
            lora_request=lora,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> SchedulerOutput:
        """One step; with asynchronous scheduling the one before it is finished only now."""
        output = self.scheduler.schedule()
        if not output.total_num_scheduled_tokens:
            # An empty step of a real engine takes about as long.
            time.sleep(0.001)
        self._in_flight.append((output, self._execute(output)))
        if len(self._in_flight) >= self._depth:
            self._finish_step()
        return output

    def run(self, *, max_steps: int = 400) -> None:
        """Step until the engine would rest."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                break
            self.step()
        while self._in_flight:
            self._finish_step()
        # A last request may have ended with the steps in flight.
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                return
            self.step()
            while self._in_flight:
                self._finish_step()
        raise AssertionError(f"stuck: {[r.status for r in self.scheduler.requests.values()]}")

    def ask(self, request_id: str, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        """Add a request, run until all is done, and give what the connector reported."""
        self.add(request_id, prompt, **options)
        self.run()
        return self.replies.get(request_id, {})

    def assert_at_rest(self) -> None:
        """No request, no reference, no save and no load is left over."""
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert not self.half._requests
        assert not self.half._loads
        assert not self.half.has_pending_work
        used = [b.block_id for b in self.pool.blocks if b.ref_cnt and not b.is_null]
        assert not used, f"blocks are still referenced: {used}"
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1
        assert not self.half._store._ledger._pins, "an artifact is still pinned"

    def counted(self, name: str) -> float:
        """A counter of the connector, with what it has not handed over yet."""
        return self.counters.get(name, 0) + self.half.stats._counters[name]

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        sampled: list[list[int]] = []
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            end = request.num_computed_tokens
            blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)[0]
            known = self._known_tokens(request, end)
            token = self.model.run(known, blocks, start=end - count, end=end)
            sampled.append([] if request.is_prefill_chunk else [token])
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self._transfer(output.kv_connector_metadata),
        )

    @staticmethod
    def _known_tokens(request: Request, count: int) -> list[int]:
        """The first tokens of a request, those included that are sampled but not yet told."""
        known = list(request.prompt_token_ids or ())
        while len(known) < count:
            known.append(int(kv_values(known)[-1]) % 49_999)
        return known[:count]

    def _transfer(self, metadata: Any) -> KVConnectorOutput:
        self._held_loads += () if self.drop_loads else metadata.loads
        self._held_saves += metadata.saves
        if not self.hold_loads:
            jobs, self._held_loads = self._held_loads, []
            self.worker.start_loads(jobs)
        if not self.hold_saves:
            jobs, self._held_saves = self._held_saves, []
            self.worker.start_saves(jobs)
        for executor in (self.worker._loader, self.worker._saver):
            executor.submit(int).result()
        finished, failed = self.worker.finished_loads()
        return KVConnectorOutput(
            finished_recving=finished or None,
            failed_recving=failed,
            kv_connector_worker_meta=self.worker.take_report(),
        )

    def _finish_step(self) -> None:
        output, result = self._in_flight.popleft()
        outputs = self.scheduler.update_from_output(output, result)
        for client in outputs.values():
            for item in client.outputs:
                if item.finish_reason is not None:
                    self.finished[item.request_id] = str(item.finish_reason)
                if item.kv_transfer_params is not None:
                    self.replies[item.request_id] = item.kv_transfer_params[TICKET_KEY]
            stats = client.scheduler_stats
            if stats is not None and stats.kv_connector_stats:
                data = stats.kv_connector_stats.get("data", stats.kv_connector_stats)
                for name, increment in data.get("counters", {}).items():
                    self.counters[name] = self.counters.get(name, 0) + increment


def open_store(engine: Engine) -> ArtifactStore:
    """The scheduler half's own store."""
    return engine.half._store
