"""The slow truth that tests and benchmarks compare with: one token at a time, no learned layout."""

from __future__ import annotations

import torch

from memos_vllm_kernels import cpu_packing
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, Packing


def import_slow(
    page: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    packing: Packing,
) -> None:
    """Write one layer's tokens one by one.

    Args:
        key, value: [tokens, kv_heads, head_dim].
        slot_mapping: [tokens] int64.
    """
    block_size, dim = page.shape[2], page.shape[3] // 2
    integers = page.view(INTEGER_OF_WIDTH[page.element_size()])
    for token, slot in enumerate(slot_mapping.tolist()):
        if packing.is_cpu:
            one = slice(token, token + 1)
            cpu_packing.pack(page, key[one], value[one], slot_mapping[one].contiguous(), packing)
            continue
        block, offset = divmod(slot, block_size)
        integers[block, :, offset, :dim] = key[token].view(integers.dtype)
        integers[block, :, offset, dim:] = value[token].view(integers.dtype)


def export_slow(
    page: torch.Tensor, slot_mapping: torch.Tensor, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one layer's slots one by one.

    For a CPU packing the places of a slot are found by importing a token of ones over zeros, dim by
    dim, into a spare page: slow, but it knows nothing of `cpu_packing.learn`.

    Returns:
        key, value: [tokens, kv_heads, head_dim] each.
    """
    _, heads, block_size, fused = page.shape
    dim = fused // 2
    integers = page.view(INTEGER_OF_WIDTH[page.element_size()])
    key = torch.empty((len(slot_mapping), heads, dim), dtype=page.dtype)
    value = torch.empty_like(key)
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        if packing.is_cpu:
            places = _places_of_slot(page, offset, packing)
            found = integers[block].flatten()[places]
            halves = found.view(2, heads, dim).unbind()
        else:
            halves = integers[block, :, offset].view(heads, 2, dim).unbind(1)
        key[token].view(integers.dtype).copy_(halves[0])
        value[token].view(integers.dtype).copy_(halves[1])
    return key, value


def _places_of_slot(page: torch.Tensor, offset: int, packing: Packing) -> torch.Tensor:
    """[2 * kv_heads * head_dim] places in a block, in the order key then value, heads, dims."""
    heads, dim = page.shape[1], page.shape[3] // 2
    spare = torch.zeros((1, *page.shape[1:]), dtype=page.dtype)
    slot = torch.tensor([offset])
    places = []
    for number in range(2 * heads * dim):
        token = torch.zeros(2 * heads * dim, dtype=page.dtype)
        token[number] = 1
        key, value = token.view(2, 1, heads, dim).unbind()
        cpu_packing.pack(spare, key, value, slot, packing)
        places.append(int(spare.flatten().nonzero()))
    return torch.tensor(places)
