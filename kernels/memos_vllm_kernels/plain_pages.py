"""Import to and export from pages that are not packed, on any device and under any strides.

Plain torch: the truth beside which the Triton kernels are tested, and what runs where Triton does
not. Numbers that are only moved move as integers, so that NaN payloads, -0.0 and denormals stay.
"""

from __future__ import annotations

import torch

from memos_vllm_kernels.conversion import from_rows, to_rows
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, PageGeometry
from memos_vllm_kernels.rotary import Angles


def import_slots(
    page: torch.Tensor,
    geometry: PageGeometry,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    numbers: torch.dtype,
    encoding: Encoding = Encoding.EXACT,
    angles: Angles | None = None,
) -> None:
    """Write tokens into one layer's slots. Checks nothing: see `pages`.

    Args:
        page: in vLLM's logical axes, mutated.
        kv: [halves, tokens, kv_heads, head_dim or row_bytes].
        slot_mapping: [tokens] int64.
        numbers: what the page's bytes mean.
        angles: by which the first half is turned.
    """
    integer = INTEGER_OF_WIDTH[geometry.dtype.itemsize]
    place = _place(slot_mapping, geometry.block_size)
    for half, target in enumerate(_slots_first(page, geometry)):
        turned = angles if half == 0 else None
        tokens = kv[half]
        if encoding is not Encoding.EXACT or turned is not None:
            shape = (len(tokens), geometry.num_kv_heads, geometry.head_dim)
            decoded = torch.empty(shape, dtype=numbers, device=page.device)
            source = tokens.view(numbers) if encoding is Encoding.EXACT else tokens
            from_rows(source, encoding, out=decoded, angles=turned)
            tokens = decoded
        target.index_put_(place, tokens.view(integer))


def export_slots(
    page: torch.Tensor,
    geometry: PageGeometry,
    block_ids: torch.Tensor,
    *,
    token_start: int,
    out: torch.Tensor,
    numbers: torch.dtype,
    encoding: Encoding = Encoding.EXACT,
) -> None:
    """Read one layer's slots. Checks nothing: see `pages`.

    Args:
        page: in vLLM's logical axes.
        block_ids: [n] int64; order is token order.
        token_start: first token, counted from the first slot of `block_ids[0]`.
        out: [halves, tokens, kv_heads, head_dim or row_bytes], mutated.
        numbers: what the page's bytes mean.
    """
    integer = INTEGER_OF_WIDTH[geometry.dtype.itemsize]
    token = torch.arange(token_start, token_start + out.shape[1], device=page.device)
    place = (block_ids[token // geometry.block_size], token % geometry.block_size)
    for half, source in enumerate(_slots_first(page, geometry)):
        found = source[place]
        if encoding is Encoding.EXACT:
            out[half].view(integer).copy_(found)
        else:
            to_rows(found.view(numbers), encoding, out=out[half])


def _slots_first(page: torch.Tensor, geometry: PageGeometry) -> torch.Tensor:
    """[halves, num_blocks, block_size, kv_heads, head_dim], so that a slot is two indices."""
    integer = INTEGER_OF_WIDTH[geometry.dtype.itemsize]
    return geometry.halves_of(page.view(integer)).transpose(2, 3)


def _place(slot_mapping: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slot_mapping // block_size, slot_mapping % block_size
