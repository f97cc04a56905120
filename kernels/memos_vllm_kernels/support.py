"""Which pages can be moved bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memos_vllm_kernels.cpu_packing import learn
from memos_vllm_kernels.errors import UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry

# vLLM cache dtype names under which a page holds the numbers of attention themselves.
_UNQUANTISED = frozenset({"auto", "float16", "half", "bfloat16", "float32", "float"})
# One byte a number, with scales kept outside the page.
_FP8 = frozenset({"fp8", "fp8_e4m3", "fp8_e5m2"})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_BYTES = frozenset({torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2})


def supported(
    shape: Sequence[int],
    dtype: torch.dtype,
    packing: Packing,
    *,
    kv_cache_dtype: str = "auto",
    num_kv_heads: int | None = None,
) -> str | None:
    """Why such pages cannot be moved bit for bit, or None when they can.

    The first call for a CPU packing loads vLLM's packing op and learns the permutation from it
    (some milliseconds); the answer is then remembered.

    Args:
        shape: of one layer's page tensor.
        dtype: of the page tensor.
        packing: of the page tensor.
        kv_cache_dtype: vLLM's `cache_config.cache_dtype`.
        num_kv_heads: for PLANES, whose shape does not show it.
    Returns:
        One clause without a full stop, or None.
    """
    try:
        # Of no memory: the shape is all that is read.
        page = torch.empty(tuple(shape), dtype=dtype, device="meta")
        geometry = PageGeometry.of(page, packing, num_kv_heads=num_kv_heads)
        if min(*geometry.page_shape, geometry.head_dim) < 1:
            return f"shape {tuple(shape)} has an empty dimension"
        reason = _dtype_reason(dtype, packing, kv_cache_dtype)
        if reason is None and packing.is_cpu:
            learn(geometry)
    except UnsupportedLayout as error:
        return error.reason
    return reason


def number_dtype(dtype: torch.dtype, kv_cache_dtype: str) -> torch.dtype:
    """What the bytes of a page mean: vLLM keeps an fp8 cache in pages of uint8."""
    if kv_cache_dtype not in _FP8:
        return dtype
    return torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def _dtype_reason(dtype: torch.dtype, packing: Packing, kv_cache_dtype: str) -> str | None:
    if kv_cache_dtype in _UNQUANTISED:
        if dtype in _FLOATS:
            return None
        return f"page dtype {dtype} is not the dtype of an unquantised KV cache"
    if kv_cache_dtype not in _FP8:
        return f"KV cache dtype {kv_cache_dtype!r} keeps more than numbers in its pages"
    if packing.is_cpu:
        return "vLLM's packing op would quantise an fp8 KV cache again instead of moving it"
    if dtype not in _BYTES:
        return f"page dtype {dtype} is not one byte wide, KV cache dtype {kv_cache_dtype!r} is"
    return None
