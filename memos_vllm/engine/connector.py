"""`MemCubeConnector`: vLLM's KV connector for cubes, a thin shell over its two halves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from memos_vllm.engine import assembly
from memos_vllm.engine.scheduler_half import SchedulerHalf
from memos_vllm.engine.stats import MemosPromMetrics, MemosStats
from memos_vllm.engine.transfer import StepMetadata, StepReport
from memos_vllm.engine.worker_half import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class MemCubeConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps cubes' KV in the block pool and in the artifact store."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._layer_index: dict[str, int] = {}
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = assembly.scheduler_half(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a future cache miss, nothing more."""
        return False

    # --- worker half --------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = assembly.layers_in_order(kv_caches)
        self._layer_index = {name: index for index, name in enumerate(layers)}
        self._worker = assembly.worker_half(self._vllm_config, self._kv_cache_config, kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """vLLM calls this before the forward pass, and `start_load_kv` behind it."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is None:
            return
        # Replayed as one graph, a forward pass calls no hook of a layer; vLLM's newer runner then
        # has no context here either.
        hooks = is_forward_context_available() and (
            get_forward_context().cudagraph_runtime_mode is not CUDAGraphMode.FULL
        )
        self._worker.begin_step(layer_by_layer=hooks)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        if self._worker is not None and isinstance(metadata, StepMetadata):
            self._worker.start_loads(metadata.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        index = self._layer_index.get(layer_name)
        if self._worker is not None and index is not None:
            self._worker.wait_for_layer(index)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing per layer: a save starts when all layers of its tokens are computed."""

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        if self._worker is not None and isinstance(metadata, StepMetadata):
            self._worker.start_saves(metadata.saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        metadata = self._get_connector_metadata()
        if isinstance(metadata, StepMetadata) and metadata.computes_nothing:
            self._worker.wait_for_progress()
        finished, failed = self._worker.finished_loads()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return None if self._worker is None else self._worker.take_report()

    # --- scheduler half -----------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._half.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self._half.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._half.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._half.on_allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._half.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        self._half.on_report(report if isinstance(report, StepReport) else None)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half.on_finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half.on_finished(request)

    def has_pending_push_work(self) -> bool:
        return self._half.has_pending_work

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return None if self._scheduler is None else self._scheduler.take_stats()

    def reset_cache(self) -> bool | None:
        return self._half.reset()

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.shutdown()
        if self._worker is not None:
            self._worker.shutdown()

    @property
    def _half(self) -> SchedulerHalf:
        assert self._scheduler is not None, "called on the worker half"
        return self._scheduler

    # --- metrics ------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return MemosStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return MemosPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[Any]:
        return ()
