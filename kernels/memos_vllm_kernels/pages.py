"""`KvPages`: the pages of a worker's layers, and the code that moves tokens in and out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import torch

from memos_vllm_kernels import checks, conversion, cpu_pages, plain_pages
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.errors import KernelInputError, UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry
from memos_vllm_kernels.residence import populate
from memos_vllm_kernels.rotary import Angles
from memos_vllm_kernels.support import number_dtype, supported

if TYPE_CHECKING:
    from memos_vllm_kernels.triton_pages import LayerTable

Kernels: TypeAlias = Literal["auto", "torch", "triton"]


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
        kernels: Kernels = "auto",
    ) -> None:
        """Check every layer once, so that moving tokens only has to check tokens.

        Args:
            pages: one tensor a layer in vLLM's logical axes, see `layout`; kept, not copied.
            kv_cache_dtype: vLLM's `cache_config.cache_dtype`.
            kernels: for pages that are not packed for a CPU. "auto" takes Triton on a GPU and
                plain torch elsewhere; "triton" on a CPU needs Triton's interpreter.
        Raises:
            KernelInputError: no layers, or layers that differ from the geometry or in device.
            UnsupportedLayout: pages that cannot be moved bit for bit.
        """
        if not pages:
            raise KernelInputError("there are no page tensors")
        shape = (pages[0].shape[0], *geometry.page_shape)
        reason = supported(
            shape,
            geometry.dtype,
            geometry.packing,
            kv_cache_dtype=kv_cache_dtype,
            num_kv_heads=geometry.num_kv_heads,
        )
        if reason is not None:
            raise UnsupportedLayout(reason)
        for layer, page in enumerate(pages):
            checks.check_page(layer, page, pages[0], shape, geometry)
        self._pages = tuple(pages)
        self.geometry = geometry
        self.number_dtype = number_dtype(geometry.dtype, kv_cache_dtype)
        wanted = "triton" if kernels == "auto" and self.device.type == "cuda" else kernels
        self._table: LayerTable | None = None
        self._by_triton = wanted == "triton" and not geometry.packing.is_cpu

    @classmethod
    def of(
        cls,
        pages: Sequence[torch.Tensor],
        packing: Packing,
        *,
        kv_cache_dtype: str = "auto",
        num_kv_heads: int | None = None,
        kernels: Kernels = "auto",
    ) -> Self:
        """The same, with the geometry read off the first layer.

        Args:
            num_kv_heads: for PLANES, whose shape does not show it.
        Raises:
            KernelInputError, UnsupportedLayout: as the constructor.
        """
        if not pages:
            raise KernelInputError("there are no page tensors")
        geometry = PageGeometry.of(pages[0], packing, num_kv_heads=num_kv_heads)
        return cls(pages, geometry, kv_cache_dtype=kv_cache_dtype, kernels=kernels)

    @property
    def num_layers(self) -> int:
        return len(self._pages)

    @property
    def num_blocks(self) -> int:
        return self._pages[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self._pages[0].device

    @property
    def takes_all_layers_at_once(self) -> bool:
        """Whether one Triton launch can move every layer: they are strided alike."""
        strides = self._pages[0].stride()
        return self._by_triton and all(page.stride() == strides for page in self._pages)

    def layer_shape(self, num_tokens: int, encoding: Encoding) -> tuple[int, int, int, int]:
        """Of one layer's tokens: `(halves, tokens, kv_heads, head_dim or row_bytes)`."""
        geometry = self.geometry
        width = geometry.head_dim
        if encoding is not Encoding.EXACT:
            width = encoding.row_bytes(width, dtype=geometry.dtype)
        return (geometry.num_halves, num_tokens, geometry.num_kv_heads, width)

    def row_dtype(self, encoding: Encoding) -> torch.dtype:
        """Of tokens outside the pages."""
        return self.geometry.dtype if encoding is Encoding.EXACT else torch.uint8

    def populate(self, num_blocks: int) -> bool:
        """Back the first blocks of every layer with memory, see `residence.populate`.

        Returns:
            False where the system cannot, or has no memory left.
        """
        count = max(0, min(num_blocks, self.num_blocks))
        return all(populate(page[:count]) for page in self._pages)

    def warm_up(self, encoding: Encoding) -> None:
        """On a CPU, compile ahead what the first move of such rows would have to wait for."""
        if not self._by_triton:
            head_dim = self.geometry.head_dim
            conversion.warm_up(encoding, head_dim=head_dim, dtype=self.number_dtype)

    def import_layer(
        self,
        layer: int,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        encoding: Encoding = Encoding.EXACT,
        angles: Angles | None = None,
        checked: bool = False,
    ) -> None:
        """Write tokens into one layer's slots, as attention itself would.

        Args:
            layer: index into the page tensors.
            kv: [halves, tokens, kv_heads, head_dim] in the page dtype, or rows of `encoding` as
                [halves, tokens, kv_heads, row_bytes] uint8; keys first, on the pages' device, last
                dim contiguous; never written, so it may lie over a read-only mmap.
            slot_mapping: [tokens] int64, `block_id * block_size + offset`, each slot once (of a
                repeated slot it is not said which token stays).
            angles: by which the keys are turned on their way in.
            checked: the slots are known to be in range; finding out waits for a GPU.
        Raises:
            KernelInputError: wrong shape, dtype, device, stride or slot; nothing was written.
        """
        page = self._page(layer)
        if not checked:
            self._check_slots(slot_mapping)
        self._check_tokens("kv", kv, len(slot_mapping), encoding)
        self._check_angles(angles, len(slot_mapping))
        slots = slot_mapping.contiguous()
        if len(slots) == 0:
            return
        if self._by_triton:
            self._import_by_triton(layer, kv[None], slots, encoding, angles)
            return
        into = cpu_pages if self.geometry.packing.is_cpu else plain_pages
        into.import_slots(
            page,
            self.geometry,
            kv,
            slots,
            numbers=self.number_dtype,
            encoding=encoding,
            angles=angles,
        )

    def export_layer(
        self,
        layer: int,
        block_ids: torch.Tensor,
        *,
        token_start: int = 0,
        out: torch.Tensor,
        encoding: Encoding = Encoding.EXACT,
        checked: bool = False,
    ) -> None:
        """Read tokens of one layer back, bit-equal to what was imported or computed.

        Args:
            layer: index into the page tensors.
            block_ids: [n] int64 on the pages' device; order is token order, repeats are fine.
            token_start: first token, counted from the first slot of `block_ids[0]`.
            out: as `kv` of `import_layer`, mutated; as many tokens as it has are read, with
                `token_start + tokens <= n * block_size`.
            checked: the block ids are known to be in range; finding out waits for a GPU.
        Raises:
            KernelInputError: wrong shape, dtype, device, stride or block id; nothing was written.
        """
        page = self._page(layer)
        num_tokens = out.shape[1] if out.dim() > 1 else 0
        if not checked:
            self._check_blocks(block_ids, token_start, num_tokens)
        self._check_tokens("out", out, num_tokens, encoding)
        if num_tokens == 0:
            return
        if self._by_triton:
            self._export_by_triton(layer, out[None], block_ids, token_start, encoding)
            return
        source = cpu_pages if self.geometry.packing.is_cpu else plain_pages
        source.export_slots(
            page,
            self.geometry,
            block_ids,
            token_start=token_start,
            out=out,
            numbers=self.number_dtype,
            encoding=encoding,
        )

    def import_layers(
        self,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        encoding: Encoding = Encoding.EXACT,
        angles: Angles | None = None,
    ) -> None:
        """`import_layer` for every layer in one launch, kv [layers, halves, tokens, ...]."""
        self._check_slots(slot_mapping)
        self._check_angles(angles, len(slot_mapping))
        for layer_kv in kv:
            self._check_tokens("kv", layer_kv, len(slot_mapping), encoding)
        if len(slot_mapping):
            self._import_by_triton(None, kv, slot_mapping.contiguous(), encoding, angles)

    def export_layers(
        self,
        block_ids: torch.Tensor,
        *,
        token_start: int = 0,
        out: torch.Tensor,
        encoding: Encoding = Encoding.EXACT,
    ) -> None:
        """`export_layer` for every layer in one launch, out [layers, halves, tokens, ...]."""
        self._check_blocks(block_ids, token_start, out.shape[2])
        for layer_out in out:
            self._check_tokens("out", layer_out, out.shape[2], encoding)
        if out.shape[2]:
            self._export_by_triton(None, out, block_ids, token_start, encoding)

    def _import_by_triton(
        self,
        layer: int | None,
        kv: torch.Tensor,
        slots: torch.Tensor,
        encoding: Encoding,
        angles: Angles | None,
    ) -> None:
        from memos_vllm_kernels import triton_pages

        triton_pages.import_layers(
            self._layers(layer),
            self.geometry,
            kv,
            slots,
            numbers=self.number_dtype,
            encoding=encoding,
            angles=angles,
        )

    def _export_by_triton(
        self,
        layer: int | None,
        out: torch.Tensor,
        block_ids: torch.Tensor,
        token_start: int,
        encoding: Encoding,
    ) -> None:
        from memos_vllm_kernels import triton_pages

        triton_pages.export_layers(
            self._layers(layer),
            self.geometry,
            block_ids.contiguous(),
            token_start=token_start,
            out=out,
            numbers=self.number_dtype,
            encoding=encoding,
        )

    def _layers(self, layer: int | None) -> LayerTable:
        """One layer, or None for all of them, as the Triton kernels find them."""
        from memos_vllm_kernels import triton_pages

        if self._table is None:
            self._table = triton_pages.LayerTable.of(self._pages)
        return self._table if layer is None else self._table.only(layer, self._pages[layer])

    def _page(self, layer: int) -> torch.Tensor:
        if not 0 <= layer < len(self._pages):
            raise KernelInputError(f"layer {layer} of {len(self._pages)} layers")
        return self._pages[layer]

    def _check_slots(self, slots: torch.Tensor) -> None:
        checks.check_index("slot_mapping", slots, self.device)
        checks.check_within("slot", slots, self.num_blocks * self.geometry.block_size)

    def _check_blocks(self, block_ids: torch.Tensor, token_start: int, num_tokens: int) -> None:
        checks.check_index("block_ids", block_ids, self.device)
        checks.check_range(token_start, num_tokens, room=len(block_ids) * self.geometry.block_size)
        checks.check_within("block id", block_ids, self.num_blocks)

    def _check_angles(self, angles: Angles | None, num_tokens: int) -> None:
        if angles is not None:
            head_dim = self.geometry.head_dim
            angles.check(num_tokens=num_tokens, head_dim=head_dim, device=self.device)

    def _check_tokens(
        self, name: str, tokens: torch.Tensor, num_tokens: int, encoding: Encoding
    ) -> None:
        shape, dtype = self.layer_shape(num_tokens, encoding), self.row_dtype(encoding)
        checks.check_tokens(name, tokens, shape, dtype, self.device)
