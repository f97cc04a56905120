"""vLLM's page tensors as the kernels see them; the only reader of KV cache specs and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from memos_vllm_kernels import KvPages, Packing, UnsupportedLayout

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig

# One byte a number, under scales that come with the weights, and so with the fingerprint.
_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def unmovable(spec: KVCacheSpec, cache: CacheConfig) -> str | None:
    """Why pages of this kind cannot be moved bit for bit, or None.

    Args:
        spec: of the attention layers, as their backend has changed it.
    """
    name = str(cache.cache_dtype)
    if name != "auto" and (name not in _FP8 or current_platform.is_cpu()):
        return f"KV cache dtype {name} is not supported yet"
    if name != "auto" and current_platform.is_fp8_fnuz():
        return "fp8 of this GPU means other numbers than elsewhere"
    if name != "auto" and getattr(cache, "calculate_kv_scales", False):
        return "the scales of the KV cache are found while serving"
    try:
        packing_of(spec)
    except UnsupportedLayout as error:
        return error.reason
    return None


def packing_of(spec: KVCacheSpec) -> Packing:
    """How a backend that is not on a CPU arranges its pages.

    Raises:
        UnsupportedLayout: otherwise than any arrangement that the kernels know.
    """
    slots = getattr(spec, "num_head_slots", None)
    content = getattr(spec, "state_content_bytes", None)
    if slots is None and content is None:
        return Packing.PLAIN
    if current_platform.is_rocm():
        # Its backends shuffle the inside of a plane for their matrix instructions.
        raise UnsupportedLayout("ROCm's attention keeps keys and values in shuffled planes")
    assert isinstance(spec, FullAttentionSpec)
    if slots == 2 and content == spec.num_kv_heads * spec.head_size * spec.dtype.itemsize:
        return Packing.PLANES
    raise UnsupportedLayout(f"{slots} head slots of {content} bytes are no known arrangement")


def open_pages(
    vllm_config: VllmConfig,
    spec: KVCacheSpec,
    layers: Sequence[str],
    kv_caches: dict[str, torch.Tensor],
) -> KvPages:
    """View the page tensors as the attention kernels do.

    Called in the background once the tensors are there, and again at the first job should the
    attention layers not know their ISA by then: they learn it when vLLM builds their metadata.

    Args:
        layers: names, from the model's input to its output.
    Raises:
        AttributeError: the layers do not know their ISA yet.
        UnsupportedLayout: pages that cannot be moved.
    """
    if current_platform.is_cpu():
        attention = vllm_config.compilation_config.static_forward_context[layers[0]]
        packing = Packing.from_isa(attention.isa)
    else:
        packing = packing_of(spec)
    pages = [kv_caches[name] for name in layers]
    if any(not isinstance(page, torch.Tensor) for page in pages):
        raise UnsupportedLayout("a layer keeps more than one tensor")
    return KvPages.of(
        pages,
        packing,
        kv_cache_dtype=str(vllm_config.cache_config.cache_dtype),
        num_kv_heads=getattr(spec, "num_kv_heads", None),
    )
