"""What a layer's KV pages look like, and whether they can be moved bit for bit.

One layer is a tensor `[num_blocks, kv_heads, block_size, 2 * head_dim]`. PLAIN pages hold a token's
key in `[..., :head_dim]` and its value in `[..., head_dim:]`, under any strides. CPU pages hold,
per block and head, a key half and then a value half, each packed for one instruction set, so that
only vLLM's own packing op knows where a token's numbers lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Self

import torch

from memos_vllm_kernels.errors import UnsupportedLayout

# To move numbers as integers: a float copy may quieten a signalling NaN.
INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class Packing(Enum):
    """How the numbers of one block and head are arranged; CPU members carry vLLM's ISA name."""

    PLAIN = "plain"
    CPU_AMX = "amx"
    CPU_VEC = "vec"
    CPU_VEC16 = "vec16"
    CPU_NEON = "neon"
    CPU_RVV = "rvv"
    CPU_VSX = "vsx"
    CPU_VXE = "vxe"

    @classmethod
    def from_isa(cls, isa: str) -> Packing:
        """The packing for vLLM's CPU attention ISA, as `layer.isa` names it.

        Raises:
            UnsupportedLayout: an ISA that this package does not know.
        """
        for packing in cls:
            if packing.is_cpu and packing.value == isa:
                return packing
        raise UnsupportedLayout(f"the CPU attention ISA {isa!r} is unknown")

    @property
    def is_cpu(self) -> bool:
        return self is not Packing.PLAIN


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """The shape of one layer's pages; the same for every layer of a `KvPages`."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    packing: Packing

    @classmethod
    def of(cls, page: torch.Tensor, packing: Packing) -> Self:
        """Read the geometry off one layer's page tensor.

        Raises:
            UnsupportedLayout: not `[num_blocks, kv_heads, block_size, 2 * head_dim]`. That it *is*
                that does not yet mean that it can be moved: see `supported`.
        """
        if page.dim() != 4 or page.shape[-1] % 2:
            raise UnsupportedLayout(
                f"shape {tuple(page.shape)} is not [blocks, kv_heads, block_size, 2 * head_dim]"
            )
        _, heads, block_size, fused = page.shape
        return cls(heads, fused // 2, block_size, page.dtype, packing)

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """`(kv_heads, block_size, 2 * head_dim)`: one block of one layer."""
        return (self.num_kv_heads, self.block_size, 2 * self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
