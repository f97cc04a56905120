"""Import to and export from plain pages, on any device and under any block and head strides.

Numbers move as integers, so that NaN payloads, -0.0 and denormals stay as they are.
"""

from __future__ import annotations

import torch

from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, PageGeometry


def import_slots(
    page: torch.Tensor,
    geometry: PageGeometry,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write tokens into one layer's slots. Checks nothing: see `pages`.

    Args:
        page: [num_blocks, kv_heads, block_size, 2 * head_dim], mutated.
        key, value: [tokens, kv_heads, head_dim].
        slot_mapping: [tokens] int64.
    """
    integer = INTEGER_OF_WIDTH[geometry.dtype.itemsize]
    # [num_blocks, block_size, kv_heads, 2 * head_dim], so that a slot is two leading indices.
    slots_first = page.view(integer).transpose(1, 2)
    place = _place(slot_mapping, geometry.block_size)
    slots_first[..., : geometry.head_dim].index_put_(place, key.view(integer))
    slots_first[..., geometry.head_dim :].index_put_(place, value.view(integer))


def export_slots(
    page: torch.Tensor,
    geometry: PageGeometry,
    slot_mapping: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Read one layer's slots. Checks nothing: see `pages`.

    Args:
        page: [num_blocks, kv_heads, block_size, 2 * head_dim].
        slot_mapping: [tokens] int64.
        key_out, value_out: [tokens, kv_heads, head_dim], mutated.
    """
    integer = INTEGER_OF_WIDTH[geometry.dtype.itemsize]
    tokens = page.view(integer).transpose(1, 2)[_place(slot_mapping, geometry.block_size)]
    key_out.view(integer).copy_(tokens[..., : geometry.head_dim])
    value_out.view(integer).copy_(tokens[..., geometry.head_dim :])


def _place(slot_mapping: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slot_mapping // block_size, slot_mapping % block_size
