"""`KvPages`: the pages of a worker's layers, moved layer by layer or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from memos_vllm_kernels import cpu_packing, cpu_pages, plain_pages
from memos_vllm_kernels.errors import KernelInputError, UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry
from memos_vllm_kernels.residence import populate
from memos_vllm_kernels.rotary import Rotation, check_rotation, rotation_tables, turn_keys
from memos_vllm_kernels.support import supported


class KvPages:
    """Page tensors of layers that share one geometry.

    Safe to use from any one thread at a time per block: it keeps no state between calls, and each
    call releases the GIL while it copies. Writing a block that attention reads at the same time is
    the caller's to prevent.
    """

    def __init__(
        self,
        pages: Sequence[torch.Tensor],
        geometry: PageGeometry,
        *,
        kv_cache_dtype: str = "auto",
        is_mla: bool = False,
    ) -> None:
        """Check every layer once, so that moving tokens only has to check tokens.

        Args:
            pages: one `[num_blocks, kv_heads, block_size, 2 * head_dim]` tensor a layer; kept, not
                copied.
            kv_cache_dtype, is_mla: see `supported`.
        Raises:
            KernelInputError: no layers, or layers that differ from the geometry or in device.
            UnsupportedLayout: pages that cannot be moved bit for bit.
        """
        if not pages:
            raise KernelInputError("there are no page tensors")
        shape = (pages[0].shape[0], *geometry.page_shape)
        reason = supported(
            shape, geometry.dtype, geometry.packing, kv_cache_dtype=kv_cache_dtype, is_mla=is_mla
        )
        if reason is not None:
            raise UnsupportedLayout(reason)
        for layer, page in enumerate(pages):
            _check_page(layer, page, pages[0], shape, geometry)
        self._pages = tuple(pages)
        self.geometry = geometry

    @classmethod
    def of(
        cls,
        pages: Sequence[torch.Tensor],
        packing: Packing,
        *,
        kv_cache_dtype: str = "auto",
        is_mla: bool = False,
    ) -> Self:
        """The same, with the geometry read off the first layer.

        Raises:
            KernelInputError, UnsupportedLayout: as the constructor.
        """
        if not pages:
            raise KernelInputError("there are no page tensors")
        geometry = PageGeometry.of(pages[0], packing)
        return cls(pages, geometry, kv_cache_dtype=kv_cache_dtype, is_mla=is_mla)

    @property
    def num_layers(self) -> int:
        return len(self._pages)

    @property
    def num_blocks(self) -> int:
        return self._pages[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self._pages[0].device

    def populate(self, num_blocks: int) -> bool:
        """Back the first blocks of every layer with memory, see `residence.populate`.

        Returns:
            False where the system cannot, or has no memory left.
        """
        count = max(0, min(num_blocks, self.num_blocks))
        return all(populate(page[:count]) for page in self._pages)

    def import_range(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write tokens into one layer's slots, as attention itself would.

        Args:
            layer: index into the page tensors.
            key, value: [tokens, kv_heads, head_dim] in the page dtype and on its device, last dim
                contiguous; never written, so they may lie over a read-only mmap.
            slot_mapping: [tokens] int64, `block_id * block_size + offset`, each slot once (of a
                repeated slot it is not said which token stays).
        Raises:
            KernelInputError: wrong shape, dtype, device, stride or slot; nothing was written.
        """
        page = self._page(layer)
        self._check_slots(slot_mapping)
        self._check_tokens("key", key, len(slot_mapping))
        self._check_tokens("value", value, len(slot_mapping))
        if len(slot_mapping) == 0:
            return
        if self.geometry.packing.is_cpu:
            cpu_packing.pack(page, key, value, slot_mapping.contiguous(), self.geometry.packing)
        else:
            plain_pages.import_slots(page, self.geometry, key, value, slot_mapping)

    def export_range(
        self,
        layer: int,
        block_ids: torch.Tensor,
        *,
        token_start: int = 0,
        num_tokens: int,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
    ) -> None:
        """Read tokens of one layer back, bit-equal to what was imported or computed.

        Args:
            layer: index into the page tensors.
            block_ids: [n] int64 on the pages' device; order is token order, repeats are fine.
            token_start: first token, counted from the first slot of `block_ids[0]`.
            num_tokens: tokens to copy; `token_start + num_tokens <= n * block_size`.
            key_out, value_out: [num_tokens, kv_heads, head_dim] in the page dtype, last dim
                contiguous, mutated.
        Raises:
            KernelInputError: wrong shape, dtype, device, stride or block id; nothing was written.
        """
        page = self._page(layer)
        self._check_blocks(block_ids, token_start, num_tokens)
        self._check_tokens("key_out", key_out, num_tokens)
        self._check_tokens("value_out", value_out, num_tokens)
        if num_tokens == 0:
            return
        if not self.geometry.packing.is_cpu:
            slots = slot_mapping(
                block_ids, self.geometry.block_size, token_start=token_start, num_tokens=num_tokens
            )
            plain_pages.export_slots(page, self.geometry, slots, key_out, value_out)
            return
        cpu_pages.export_packed(
            page,
            self.geometry,
            block_ids,
            token_start=token_start,
            key_out=key_out,
            value_out=value_out,
        )

    @property
    def takes_all_layers_at_once(self) -> bool:
        """Whether one Triton launch can move every layer: plain pages of a GPU, strided alike."""
        first = self._pages[0]
        return first.is_cuda and all(page.stride() == first.stride() for page in self._pages)

    def import_layers(
        self, kv: torch.Tensor, slot_mapping: torch.Tensor, rotation: Rotation | None
    ) -> None:
        """`import_range` for every layer in one launch; see `import_tokens`."""
        from memos_vllm_kernels import triton_pages

        self._check_slots(slot_mapping)
        for layer_kv in kv:
            self._check_tokens("key", layer_kv[0], len(slot_mapping))
            self._check_tokens("value", layer_kv[1], len(slot_mapping))
        triton_pages.import_layers(
            self._pages, self.geometry, kv, slot_mapping.contiguous(), rotation=rotation
        )

    def export_layers(
        self, block_ids: torch.Tensor, *, token_start: int, out: torch.Tensor
    ) -> None:
        """`export_range` for every layer in one launch; see `export_tokens`."""
        from memos_vllm_kernels import triton_pages

        num_tokens = out.shape[2]
        self._check_blocks(block_ids, token_start, num_tokens)
        for layer_out in out:
            self._check_tokens("key_out", layer_out[0], num_tokens)
            self._check_tokens("value_out", layer_out[1], num_tokens)
        triton_pages.export_layers(
            self._pages, self.geometry, block_ids.contiguous(), token_start=token_start, out=out
        )

    def _page(self, layer: int) -> torch.Tensor:
        if not 0 <= layer < len(self._pages):
            raise KernelInputError(f"layer {layer} of {len(self._pages)} layers")
        return self._pages[layer]

    def _check_slots(self, slots: torch.Tensor) -> None:
        _check_index("slot_mapping", slots, self.device)
        _check_within("slot", slots, self.num_blocks * self.geometry.block_size)

    def _check_blocks(self, block_ids: torch.Tensor, token_start: int, num_tokens: int) -> None:
        _check_index("block_ids", block_ids, self.device)
        room = len(block_ids) * self.geometry.block_size
        if token_start < 0 or num_tokens < 0 or token_start + num_tokens > room:
            raise KernelInputError(
                f"tokens {token_start} to {token_start + num_tokens} of {room} in the blocks"
            )
        _check_within("block id", block_ids, self.num_blocks)

    def _check_tokens(self, name: str, tokens: torch.Tensor, num_tokens: int) -> None:
        geometry = self.geometry
        shape = (num_tokens, geometry.num_kv_heads, geometry.head_dim)
        if tuple(tokens.shape) != shape:
            raise KernelInputError(f"{name} has shape {tuple(tokens.shape)}, expected {shape}")
        if tokens.dtype != geometry.dtype or tokens.device != self.device:
            raise KernelInputError(
                f"{name} is {tokens.dtype} on {tokens.device}, "
                f"the pages are {geometry.dtype} on {self.device}"
            )
        if tokens.numel() and tokens.stride(-1) != 1:
            raise KernelInputError(f"{name} is not contiguous along head_dim: {tokens.stride()}")


def import_tokens(
    pages: KvPages,
    kv: torch.Tensor | Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    rotation: Rotation | None = None,
) -> None:
    """Write canonical KV into every layer's slots; on a GPU in one launch of a Triton kernel.

    Args:
        kv: [layers, 2, tokens, kv_heads, head_dim], or one [2, tokens, kv_heads, head_dim] a layer.
        slot_mapping: [tokens] int64, see `KvPages.import_range`.
        rotation: turn the keys to other positions on their way in; values hold none.
    Raises:
        KernelInputError: wrong shape, dtype, device, stride or slot; layers before the wrong one
            may have been written.
    """
    _check_layers("kv", kv, pages)
    if rotation is not None:
        for layer_kv in kv:
            check_rotation(layer_kv[0], rotation.deltas, rotation.table)
    if isinstance(kv, torch.Tensor) and pages.takes_all_layers_at_once:
        pages.import_layers(kv, slot_mapping, rotation)
        return
    tables = None if rotation is None else rotation_tables(rotation.deltas, rotation.table)
    for layer in range(pages.num_layers):
        key, value = kv[layer][0], kv[layer][1]
        if rotation is not None and tables is not None:
            key = turn_keys(key, tables, rotation.table)
        pages.import_range(layer, key, value, slot_mapping)


def export_tokens(
    pages: KvPages,
    block_ids: torch.Tensor,
    num_tokens: int,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    token_start: int = 0,
) -> torch.Tensor | Sequence[torch.Tensor]:
    """Read every layer's tokens into the canonical layout.

    Args:
        block_ids, num_tokens, token_start: see `KvPages.export_range`.
        out: [layers, 2, num_tokens, kv_heads, head_dim], or one [2, num_tokens, kv_heads, head_dim]
            a layer, mutated; made here when None.
    Returns:
        `out`.
    Raises:
        KernelInputError: wrong shape, dtype, device, stride or block id.
    """
    if out is None:
        heads, dim = pages.geometry.num_kv_heads, pages.geometry.head_dim
        out = torch.empty(
            (pages.num_layers, 2, max(num_tokens, 0), heads, dim),
            dtype=pages.geometry.dtype,
            device=pages.device,
        )
    _check_layers("out", out, pages)
    if isinstance(out, torch.Tensor) and pages.takes_all_layers_at_once:
        pages.export_layers(block_ids, token_start=token_start, out=out)
        return out
    for layer in range(pages.num_layers):
        pages.export_range(
            layer,
            block_ids,
            token_start=token_start,
            num_tokens=num_tokens,
            key_out=out[layer][0],
            value_out=out[layer][1],
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
    if token_start < 0 or num_tokens < 0 or token_start + num_tokens > len(block_ids) * block_size:
        raise KernelInputError(
            f"tokens {token_start} to {token_start + num_tokens} "
            f"of {len(block_ids) * block_size} in the blocks"
        )
    tokens = torch.arange(token_start, token_start + num_tokens, device=block_ids.device)
    return block_ids[tokens // block_size] * block_size + tokens % block_size


def _check_page(
    layer: int,
    page: torch.Tensor,
    first: torch.Tensor,
    shape: tuple[int, ...],
    geometry: PageGeometry,
) -> None:
    if tuple(page.shape) != shape or page.dtype != geometry.dtype or page.device != first.device:
        raise KernelInputError(
            f"layer {layer} is {page.dtype} {tuple(page.shape)} on {page.device}, "
            f"expected {geometry.dtype} {shape} on {first.device}"
        )
    if page.stride(-1) != 1:
        raise UnsupportedLayout(f"layer {layer} is not contiguous along head_dim")
    if not geometry.packing.is_cpu:
        return
    if page.device.type != "cpu":
        raise UnsupportedLayout(f"layer {layer} is on {page.device} and packed for a CPU")
    if not page[:1].is_contiguous():
        raise UnsupportedLayout(f"layer {layer} has packed blocks that are not contiguous")


def _check_layers(name: str, kv: torch.Tensor | Sequence[torch.Tensor], pages: KvPages) -> None:
    if len(kv) != pages.num_layers:
        raise KernelInputError(f"{name} has {len(kv)} layers, the pages have {pages.num_layers}")
    for layer, halves in enumerate(kv):
        if halves.dim() != 4 or halves.shape[0] != 2:
            raise KernelInputError(
                f"{name} of layer {layer} has shape {tuple(halves.shape)}, "
                "expected [2, tokens, kv_heads, head_dim]"
            )


def _check_index(name: str, index: torch.Tensor, device: torch.device) -> None:
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != device:
        raise KernelInputError(
            f"{name} is {index.dtype} {tuple(index.shape)} on {index.device}, "
            f"expected one dimension of int64 on {device}"
        )


def _check_within(name: str, index: torch.Tensor, limit: int) -> None:
    """The packing op writes wherever it is told, so an index out of range must not reach it."""
    if len(index) == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= limit:
        raise KernelInputError(f"{name} {low if low < 0 else high} is not in 0 to {limit - 1}")
