"""What a layer's KV pages look like, and where in them a token's numbers lie.

One layer is a tensor of vLLM's logical axes [num_blocks, head slots, block_size, content], under
any strides. What a head slot and its content hold depends on the attention backend:

    PLAIN   a slot for each KV head; its content is the key and then the value
    PLANES  two slots, the keys and the values; the content is every KV head in turn
    LATENT  one slot; the content is the latent vector of MLA, which is no key and no value
    CPU_*   as PLAIN, but a block and head holds a key half and then a value half, each packed for
            one instruction set, so that only vLLM's own packing op knows where a number lies
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
    """How the numbers of one block are arranged; CPU members carry vLLM's ISA name."""

    PLAIN = "plain"
    PLANES = "planes"
    LATENT = "latent"
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
        return self not in (Packing.PLAIN, Packing.PLANES, Packing.LATENT)

    @property
    def num_halves(self) -> int:
        """2: keys and values; 1: one latent vector for both."""
        return 1 if self is Packing.LATENT else 2


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """The shape of one layer's pages; the same for every layer of a `KvPages`."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    packing: Packing

    @classmethod
    def of(cls, page: torch.Tensor, packing: Packing, *, num_kv_heads: int | None = None) -> Self:
        """Read the geometry off one layer's page tensor.

        Args:
            num_kv_heads: for PLANES, whose shape does not show it.
        Raises:
            UnsupportedLayout: a shape that such pages cannot have. That it can does not yet mean
                that they can be moved: see `supported`.
        """
        if page.dim() != 4:
            raise UnsupportedLayout(f"shape {tuple(page.shape)} has not 4 dimensions")
        _, slots, block_size, content = page.shape
        if packing is Packing.LATENT:
            heads, dim = slots, content
        elif packing is Packing.PLANES:
            heads = num_kv_heads or 0
            dim = content // max(heads, 1)
        else:
            heads, dim = slots, content // 2
        geometry = cls(heads, dim, block_size, page.dtype, packing)
        if geometry.page_shape != tuple(page.shape[1:]):
            raise UnsupportedLayout(
                f"shape {tuple(page.shape)} is not {_SHAPES[packing]} ({packing.value})"
            )
        return geometry

    @property
    def num_halves(self) -> int:
        return self.packing.num_halves

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Of one block of one layer: `(head slots, block_size, content)`."""
        if self.packing is Packing.PLANES:
            return (2, self.block_size, self.num_kv_heads * self.head_dim)
        if self.packing is Packing.LATENT:
            return (1, self.block_size, self.head_dim)
        return (self.num_kv_heads, self.block_size, 2 * self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value (or latent vector) in one layer."""
        return self.num_halves * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def halves_of(self, page: torch.Tensor) -> torch.Tensor:
        """A view of pages that are not packed, the same for every backend.

        Returns:
            [halves, num_blocks, kv_heads, block_size, head_dim].
        """
        blocks, _, size, _ = page.shape
        block, slot, token, number = page.stride()
        heads, dim = self.num_kv_heads, self.head_dim
        shape = (self.num_halves, blocks, heads, size, dim)
        if self.packing is Packing.PLANES:
            strides = (slot, block, dim * number, token, number)
        else:
            strides = (dim * number, block, slot, token, number)
        return page.as_strided(shape, strides)


_SHAPES = dict.fromkeys(Packing, "[blocks, kv_heads, block_size, 2 * head_dim]") | {
    Packing.PLANES: "[blocks, 2, block_size, kv_heads * head_dim]",
    Packing.LATENT: "[blocks, 1, block_size, latent_dim]",
}
