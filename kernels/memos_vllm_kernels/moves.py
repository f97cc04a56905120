"""Every layer's tokens in or out with one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memos_vllm_kernels import checks
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.errors import KernelInputError
from memos_vllm_kernels.pages import KvPages
from memos_vllm_kernels.rotary import Rotation


def import_blocks(
    pages: KvPages,
    kv: torch.Tensor | Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    encoding: Encoding = Encoding.EXACT,
    rotation: Rotation | None = None,
) -> None:
    """Write canonical KV into every layer's slots; on a GPU in one launch of a Triton kernel.

    Args:
        kv: [layers, halves, tokens, kv_heads, head_dim] in the page dtype, or rows of `encoding`
            as [layers, halves, tokens, kv_heads, row_bytes] uint8, or one such tensor a layer; see
            `KvPages.import_layer`.
        slot_mapping: [tokens] int64, any slots, not only whole blocks.
        rotation: turn the keys to other positions on their way in; values hold none.
    Raises:
        KernelInputError: wrong shape, dtype, device, stride or slot; layers before the wrong one
            may have been written.
    """
    _check_layers("kv", kv, pages)
    angles = None
    if rotation is not None:
        rotation.check(
            num_tokens=len(slot_mapping), head_dim=pages.geometry.head_dim, device=pages.device
        )
        angles = rotation.angles()
    if isinstance(kv, torch.Tensor) and pages.takes_all_layers_at_once:
        pages.import_layers(kv, slot_mapping, encoding=encoding, angles=angles)
        return
    for layer in range(pages.num_layers):
        pages.import_layer(layer, kv[layer], slot_mapping, encoding=encoding, angles=angles)


def export_blocks(
    pages: KvPages,
    block_ids: torch.Tensor,
    num_tokens: int,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    token_start: int = 0,
    encoding: Encoding = Encoding.EXACT,
) -> torch.Tensor | Sequence[torch.Tensor]:
    """Read every layer's tokens into the canonical layout.

    Args:
        block_ids: [n] int64; order is token order, repeats are fine.
        num_tokens: `token_start + num_tokens <= n * block_size`.
        out: as `kv` of `import_blocks`, mutated; made here when None.
        token_start: first token, counted from the first slot of `block_ids[0]`.
    Returns:
        `out`.
    Raises:
        KernelInputError: wrong shape, dtype, device, stride or block id.
    """
    shape = pages.layer_shape(num_tokens, encoding)
    if out is None:
        room = len(block_ids) * pages.geometry.block_size
        checks.check_range(token_start, num_tokens, room=room)
        dtype = pages.row_dtype(encoding)
        out = torch.empty((pages.num_layers, *shape), dtype=dtype, device=pages.device)
    _check_layers("out", out, pages)
    for layer, tokens in enumerate(out):
        if tokens.shape != shape:
            raise KernelInputError(
                f"out of layer {layer} has shape {tuple(tokens.shape)}, expected {shape}"
            )
    if isinstance(out, torch.Tensor) and pages.takes_all_layers_at_once:
        pages.export_layers(block_ids, token_start=token_start, out=out, encoding=encoding)
        return out
    for layer in range(pages.num_layers):
        pages.export_layer(
            layer, block_ids, token_start=token_start, out=out[layer], encoding=encoding
        )
    return out


def slot_mapping(
    block_ids: torch.Tensor, block_size: int, *, token_start: int = 0, num_tokens: int
) -> torch.Tensor:
    """The slots of tokens `[token_start, token_start + num_tokens)` of a run of blocks.

    Args:
        block_ids: [n] int64; order is token order.
    Returns:
        [num_tokens] int64 on the device of `block_ids`.
    Raises:
        KernelInputError: fewer blocks than tokens need.
    """
    checks.check_range(token_start, num_tokens, room=len(block_ids) * block_size)
    tokens = torch.arange(token_start, token_start + num_tokens, device=block_ids.device)
    return block_ids[tokens // block_size] * block_size + tokens % block_size


def _check_layers(name: str, kv: torch.Tensor | Sequence[torch.Tensor], pages: KvPages) -> None:
    if len(kv) != pages.num_layers:
        raise KernelInputError(f"{name} has {len(kv)} layers, the pages have {pages.num_layers}")
