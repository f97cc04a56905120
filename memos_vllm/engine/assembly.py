"""Builds the connector's halves from vLLM's configuration; the only reader of VllmConfig."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from memos_vllm.activation.fingerprint import Fingerprint, NumericsClass, model_fingerprint
from memos_vllm.activation.residency import Residency
from memos_vllm.activation.store import ArtifactStore
from memos_vllm.config import ServerSettings
from memos_vllm.engine.names import CONNECTOR_NAME
from memos_vllm.engine.pages import open_pages, unmovable
from memos_vllm.engine.scheduler_half import EngineShape, SchedulerHalf
from memos_vllm.engine.secrets import load_keys
from memos_vllm.engine.ticket import TicketVerifier
from memos_vllm.engine.worker_half import RankShape, WorkerHalf
from memos_vllm.errors import ConfigurationError
from memos_vllm_kernels import Encoding

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


def settings_of(vllm_config: VllmConfig) -> ServerSettings:
    """Our settings: the environment, then what `kv_connector_extra_config` says.

    Raises:
        ConfigurationError: a value is of the wrong type or out of range.
    """
    config = vllm_config.kv_transfer_config
    extra = {} if config is None else _own_extra_config(config)
    try:
        return ServerSettings(**extra)
    except ValidationError as error:
        raise ConfigurationError(
            f"kv_connector_extra_config of {CONNECTOR_NAME} is wrong: {error}"
        ) from error


def _own_extra_config(config: Any) -> dict[str, Any]:
    """Our connector's extra config, also when it is one child of a MultiConnector."""
    if config.kv_connector == CONNECTOR_NAME:
        return dict(config.kv_connector_extra_config)
    for child in config.kv_connector_extra_config.get("connectors", ()):
        if child.get("kv_connector") == CONNECTOR_NAME:
            return dict(child.get("kv_connector_extra_config", {}))
    return {}


def fingerprint_of(vllm_config: VllmConfig) -> Fingerprint:
    """The served model's fingerprint; cached on disk by the weight files' identity."""
    model = vllm_config.model_config
    load = vllm_config.load_config
    return model_fingerprint(
        model.model,
        revision=model.revision,
        dtype=str(model.dtype).removeprefix("torch."),
        config=model.hf_text_config.to_dict(),
        quantization=model.quantization,
        load_format=str(getattr(load.load_format, "value", load.load_format)),
        seed=model.seed,
        cache_dir=settings_of(vllm_config).data_dir / "fingerprints",
    )


def numerics_of(vllm_config: VllmConfig) -> str:
    """Everything besides the model that decides KV bits, as one string."""
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    kv_dtype = str(cache.cache_dtype)
    backend = vllm_config.attention_config.backend
    numerics = NumericsClass(
        device=_device_name(),
        isa=_cpu_isa(vllm_config) if current_platform.is_cpu() else "none",
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        attention_backend=str(getattr(backend, "name", backend)).lower(),
        kv_dtype=model_dtype if kv_dtype == "auto" else kv_dtype,
        model_dtype=model_dtype,
        scales="none" if kv_dtype == "auto" else "checkpoint",
        artifact_dtype=settings_of(vllm_config).artifact_dtype,
    )
    return str(numerics)


def open_store(vllm_config: VllmConfig, *, budget: bool) -> ArtifactStore:
    """The artifact store; only the scheduler half, which commits, evicts to the budget."""
    settings = settings_of(vllm_config)
    return ArtifactStore(
        settings.artifacts_dir,
        mac_key=load_keys(settings.secrets_dir).artifact,
        budget_bytes=settings.artifact_budget_bytes if budget else None,
    )


def scheduler_half(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> SchedulerHalf:
    settings = settings_of(vllm_config)
    shape = _engine_shape(vllm_config, kv_cache_config)
    if shape.unsupported is not None:
        logger.warning(
            "memos: memory KV is computed with each request and not kept: %s", shape.unsupported
        )
    store = open_store(vllm_config, budget=True)
    report = store.scan()
    logger.info(
        "memos: %d artifacts in %s, %d quarantined",
        report.num_artifacts,
        settings.artifacts_dir,
        len(report.quarantined),
    )
    return SchedulerHalf(
        shape=shape,
        store=store,
        fingerprint=fingerprint_of(vllm_config).digest,
        numerics=numerics_of(vllm_config),
        verifier=TicketVerifier(load_keys(settings.secrets_dir).ticket),
        residency=Residency(
            budget_blocks=_budget_blocks(vllm_config, kv_cache_config),
            horizon_blocks=min(shape.step_blocks, kv_cache_config.num_blocks - 1),
        ),
        allow_portable=settings.allow_portable,
    )


def worker_half(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]
) -> WorkerHalf | None:
    """This rank's half, or None where the engine's KV cannot be moved."""
    if _unsupported(vllm_config, kv_cache_config) is not None:
        return None
    layers = layers_in_order(kv_caches)
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    settings = settings_of(vllm_config)
    half = WorkerHalf(
        store=open_store(vllm_config, budget=False),
        rank=_rank_shape(vllm_config, layers),
        open_pages=functools.partial(open_pages, vllm_config, spec, layers, kv_caches),
        block_size=spec.block_size,
        allow_portable=settings.allow_portable,
        encoding=Encoding(settings.artifact_dtype),
    )
    half.prepare(num_blocks=_budget_blocks(vllm_config, kv_cache_config))
    return half


def layers_in_order(kv_caches: dict[str, torch.Tensor]) -> list[str]:
    """Names of this rank's attention layers, from the model's input to its output."""
    return sorted(kv_caches, key=extract_layer_index)


def _budget_blocks(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """How many blocks of the pool memory may keep; one block of it is never used."""
    return int((kv_cache_config.num_blocks - 1) * settings_of(vllm_config).residency_fraction)


def _engine_shape(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> EngineShape:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    total_kv_heads = model.get_total_num_kv_heads()
    head_ranks = min(parallel.tensor_parallel_size, total_kv_heads)
    # A step schedules at most its token budget, and one more block may begin for each request.
    step_blocks = -(-scheduler.max_num_batched_tokens // spec.block_size) + scheduler.max_num_seqs
    return EngineShape(
        block_size=spec.block_size,
        step_blocks=step_blocks,
        total_layers=model.get_total_num_hidden_layers(),
        total_kv_heads=total_kv_heads,
        num_shards=head_ranks * parallel.pipeline_parallel_size,
        unsupported=_unsupported(vllm_config, kv_cache_config),
    )


def _unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why this engine's KV cannot be moved bit for bit, or None."""
    parallel = vllm_config.parallel_config
    spec: KVCacheSpec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    obstacles = {
        "the model mixes several kinds of attention": len(kv_cache_config.kv_cache_groups) != 1,
        f"attention of kind {type(spec).__name__} is not supported yet": (
            type(spec) is not FullAttentionSpec
        ),
        "keys and values differ in size": (
            getattr(spec, "head_size_v", None) not in (None, getattr(spec, "head_size", None))
        ),
        "context parallelism is not supported yet": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "speculative decoding is not supported yet": vllm_config.speculative_config is not None,
    }
    found = next((reason for reason, met in obstacles.items() if met), None)
    return found or unmovable(spec, vllm_config.cache_config)


def _rank_shape(vllm_config: VllmConfig, layers: list[str]) -> RankShape:
    parallel = vllm_config.parallel_config
    total_heads = vllm_config.model_config.get_total_num_kv_heads()
    ranks = parallel.tensor_parallel_size
    rank = get_tensor_model_parallel_rank()
    # With fewer KV heads than ranks, consecutive ranks hold the same head.
    replicas = max(1, ranks // total_heads)
    heads_per_rank = max(1, total_heads // ranks)
    logger.debug("memos: pipeline rank %d holds %d layers", get_pp_group().rank, len(layers))
    return RankShape(
        layer_start=extract_layer_index(layers[0]),
        head_start=rank // replicas * heads_per_rank,
        saves=rank % replicas == 0,
    )


def _device_name() -> str:
    if current_platform.is_cpu():
        return f"cpu-{current_platform.get_cpu_architecture().name.lower()}"
    return str(current_platform.get_device_name()).lower().replace(" ", "-")


def _cpu_isa(vllm_config: VllmConfig) -> str:
    """The instruction set that CPU attention computes with; vLLM has no public name for it."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(
        _get_attn_isa(
            vllm_config.model_config.dtype,
            vllm_config.cache_config.block_size,
            vllm_config.model_config.get_head_size(),
            str(vllm_config.cache_config.cache_dtype),
        )
    )
