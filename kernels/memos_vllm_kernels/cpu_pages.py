"""Import to ISA-packed CPU pages by vLLM's op; export by whole blocks and the learned permutation.

Numbers move as integers, so that NaN payloads, -0.0 and denormals stay as they are. Few and large
calls, because each one takes the GIL again and a worker's main thread is busy: one `take` per block
is 1.3 times as fast alone, and slower beside another thread, which it slows to less than half.
`numpy.take` because it runs at 3.5 GB/s on 16-bit numbers where `index_select` on the last axis
runs at 0.5 (one Sapphire Rapids core).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from memos_vllm_kernels import cpu_packing
from memos_vllm_kernels.conversion import from_rows, pieces, to_rows
from memos_vllm_kernels.cpu_packing import Gather, learn
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, PageGeometry
from memos_vllm_kernels.rotary import Angles
from memos_vllm_kernels.scratch import scratch

# Bounds the scratch of one call; smaller ones were no faster (24 blocks of 96 KiB against 8).
_SCRATCH_BYTES = 4 << 20
_NUMPY_INTEGER_OF_WIDTH = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


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
        page: [num_blocks, kv_heads, block_size, 2 * head_dim], blocks contiguous, mutated.
        kv: [2, tokens, kv_heads, head_dim or row_bytes].
        slot_mapping: [tokens] int64, contiguous.
        numbers: what the page's bytes mean.
        angles: by which the keys are turned.
    """
    if encoding is Encoding.EXACT and angles is None:
        cpu_packing.pack(page, kv[0], kv[1], slot_mapping, geometry.packing)
        return
    for piece in pieces(len(slot_mapping), geometry.num_kv_heads * geometry.head_dim):
        key, value = (
            kv[half, piece]
            if encoding is Encoding.EXACT and half_angles is None
            else _converted(
                kv[half, piece],
                geometry,
                numbers=numbers,
                encoding=encoding,
                angles=None if half_angles is None else half_angles.of_tokens(piece),
                purpose=f"half {half}",
            )
            for half, half_angles in ((0, angles), (1, None))
        )
        cpu_packing.pack(page, key, value, slot_mapping[piece], geometry.packing)


def _converted(
    rows: torch.Tensor,
    geometry: PageGeometry,
    *,
    numbers: torch.dtype,
    encoding: Encoding,
    angles: Angles | None,
    purpose: str,
) -> torch.Tensor:
    shape = (len(rows), geometry.num_kv_heads, geometry.head_dim)
    out = scratch(purpose, shape, numbers)
    from_rows(rows, encoding, out=out, angles=angles)
    return out


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
    """Copy a range of tokens of one layer. Checks nothing: see `pages`.

    Args:
        page: [num_blocks, kv_heads, block_size, 2 * head_dim], blocks contiguous.
        block_ids: [n] int64; order is token order.
        token_start: first token, counted from the first slot of `block_ids[0]`.
        out: [2, tokens, kv_heads, head_dim or row_bytes], mutated.
        numbers: what the page's bytes mean.
    """
    block_size, num_tokens = geometry.block_size, out.shape[1]
    step = max(1, _SCRATCH_BYTES // (geometry.token_bytes * block_size))
    integers = page.view(INTEGER_OF_WIDTH[geometry.dtype.itemsize])
    last_block = -(-(token_start + num_tokens) // block_size)
    for first in range(token_start // block_size, last_block, step):
        chosen = block_ids[first : min(first + step, last_block)]
        blocks = integers.index_select(0, chosen)
        # The tokens of these blocks, cut to the range that is asked for.
        begin = max(token_start, first * block_size)
        end = min(token_start + num_tokens, (first + len(chosen)) * block_size)
        rows = out[:, begin - token_start : end - token_start]
        if encoding is Encoding.EXACT:
            _unpack(blocks, geometry, begin - first * block_size, rows[0], rows[1])
            continue
        shape = (2, end - begin, geometry.num_kv_heads, geometry.head_dim)
        found = scratch("unpacked", shape, numbers)
        _unpack(blocks, geometry, begin - first * block_size, found[0], found[1])
        for half in range(2):
            to_rows(found[half], encoding, out=rows[half])


def _unpack(
    blocks: torch.Tensor,
    geometry: PageGeometry,
    offset: int,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Write tokens `[offset, offset + len(key_out))` of gathered blocks, in at most three parts."""
    layout = learn(geometry)
    block_size, num_tokens = geometry.block_size, len(key_out)
    flat = blocks.view(len(blocks), -1).numpy()
    done = 0
    while done < num_tokens:
        block, inside = divmod(offset + done, block_size)
        whole = (num_tokens - done) // block_size if inside == 0 else 0
        count = whole * block_size if whole else min(block_size - inside, num_tokens - done)
        source = flat[block : block + max(whole, 1)]
        tokens = (inside, inside + count) if not whole else (0, block_size)
        for gather, out in ((layout.key, key_out), (layout.value, value_out)):
            _take(source, gather, geometry, tokens, out[done : done + count])
        done += count


def _take(
    source: npt.NDArray[np.integer],
    gather: Gather,
    geometry: PageGeometry,
    tokens: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """Take the same tokens of every block of `source`, [blocks, numbers of a block]."""
    if not out.is_contiguous():
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        _take(source, gather, geometry, tokens, dense)
        integer = INTEGER_OF_WIDTH[out.element_size()]
        out.view(integer).copy_(dense.view(integer))
        return
    unit = _NUMPY_INTEGER_OF_WIDTH[gather.unit_bytes]
    units_per_token = len(gather.index) // geometry.block_size
    index = gather.index[tokens[0] * units_per_token : tokens[1] * units_per_token]
    target = out.view(INTEGER_OF_WIDTH[out.element_size()]).numpy().reshape(-1).view(unit)
    # mode="clip" lets numpy write into `out` directly; no index is out of range.
    np.take(
        source.view(unit), index, axis=1, out=target.reshape(len(source), len(index)), mode="clip"
    )
