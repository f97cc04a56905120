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
    is_mla: bool = False,
) -> str | None:
    """Why such pages cannot be moved bit for bit, or None when they can.

    The first call for a CPU packing loads vLLM's packing op and learns the permutation from it
    (some milliseconds); the answer is then remembered.

    Args:
        shape: of one layer's page tensor.
        dtype: of the page tensor.
        packing: of the page tensor.
        kv_cache_dtype: vLLM's `cache_config.cache_dtype`.
        is_mla: the layer keeps one latent vector instead of keys and values, which its shape need
            not show.
    Returns:
        One clause without a full stop, or None.
    """
    reason = _shape_reason(shape, is_mla) or _dtype_reason(dtype, packing, kv_cache_dtype)
    if reason is not None or not packing.is_cpu:
        return reason
    _, heads, block_size, fused = shape
    try:
        learn(PageGeometry(heads, fused // 2, block_size, dtype, packing))
    except UnsupportedLayout as error:
        return error.reason
    return None


def _shape_reason(shape: Sequence[int], is_mla: bool) -> str | None:
    if is_mla:
        return "the layer keeps one latent vector instead of keys and values (MLA)"
    if len(shape) != 4:
        return f"a page tensor has 4 dimensions, this one has shape {tuple(shape)}"
    _, heads, block_size, fused = shape
    if min(heads, block_size, fused) < 1 or fused % 2:
        return f"shape {tuple(shape)} is not [blocks, kv_heads, block_size, 2 * head_dim]"
    return None


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
