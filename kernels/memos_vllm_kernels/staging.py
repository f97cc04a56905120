"""Moving layers between host memory and pages while the model runs.

On a GPU each layer goes through pinned staging on a stream of its own, and an event says when its
pages hold it, so that attention waits for one layer and not for all. On a CPU the same calls copy
at once and there is nothing to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from memos_vllm_kernels import checks
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.pages import KvPages

# One buffer is filled by the host while the other is copied to the device.
_NUM_BUFFERS = 2

_HOST = torch.device("cpu")

Mark: TypeAlias = Any  # where a stream stood; None on a CPU


class Device(Protocol):
    """The few things of `torch.cuda` that staging needs; a test brings its own."""

    def stream(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...
    def pinned(self, num_bytes: int) -> torch.Tensor: ...
    def synchronize(self) -> None: ...


class CudaDevice:
    """The GPU that the pages are on.

    Args:
        device: of the pages.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def use(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


@dataclass
class _Buffer:
    """Pinned memory for one layer, and when the device has read it."""

    memory: torch.Tensor
    read: Mark = None

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[:num_bytes].view(dtype).view(shape)


class PageMover:
    """Copies layers in and out of pages, in order, on a stream of its own.

    `mark` and `wait_for_layer` are for the thread that runs the model, all else for one other
    thread. Pages belong to whoever moves them until `wait_for_layer` (imports) or `export_layer`
    (exports) is through.

    Args:
        pages: to move into and out of.
        device_of: for tests. By default a GPU's own streams, and none for pages on a CPU.
    """

    def __init__(
        self, pages: KvPages, *, device_of: Callable[[KvPages], Device | None] | None = None
    ) -> None:
        self.pages = pages
        self._device = (device_of or _device_of)(pages)
        self._stream: Any = None if self._device is None else self._device.stream()
        self._buffers: list[_Buffer] = []
        self._turn = _NUM_BUFFERS - 1
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._imported: dict[int, Mark] = {}

    def mark(self) -> Mark:
        """What the current stream has been given so far; imports and exports come after it."""
        if self._device is None:
            return None
        return self._device.current_stream().record_event()

    def import_layer(
        self,
        layer: int,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        encoding: Encoding = Encoding.EXACT,
        after: Mark = None,
    ) -> None:
        """`KvPages.import_layer` from host memory.

        Returns when `kv` may be dropped; on a GPU the pages hold it only after `wait_for_layer`.

        Args:
            kv, slot_mapping: as there, but in host memory, and verified.
            after: what must have been computed before the pages are written; None is everything
                that the device was given.
        Raises:
            KernelInputError: as there; nothing was written.
        """
        pages = self.pages
        if self._device is None:
            pages.import_layer(layer, kv, slot_mapping, encoding=encoding)
            return
        # On the host, where it costs no wait for the device.
        checks.check_index("slot_mapping", slot_mapping, _HOST)
        slots = pages.num_blocks * pages.geometry.block_size
        checks.check_within("slot", slot_mapping, slots)
        shape, dtype = pages.layer_shape(len(slot_mapping), encoding), pages.row_dtype(encoding)
        checks.check_tokens("kv", kv, shape, dtype, _HOST)
        buffer = self._free_buffer(kv.numel() * dtype.itemsize)
        staged = buffer.view(shape, dtype)
        staged.copy_(kv)
        with self._after(after):
            there = staged.to(pages.device, non_blocking=True)
            slots_there = self._slots_there(slot_mapping)
            pages.import_layer(layer, there, slots_there, encoding=encoding, checked=True)
            buffer.read = self._imported[layer] = self._stream.record_event()

    def export_layer(
        self,
        layer: int,
        block_ids: torch.Tensor,
        *,
        out: torch.Tensor,
        token_start: int = 0,
        encoding: Encoding = Encoding.EXACT,
        after: Mark = None,
    ) -> None:
        """`KvPages.export_layer` to host memory; returns when `out` holds the tokens.

        Args:
            block_ids, out: as there, but in host memory.
            after: what must have been computed before the pages are read; as for imports.
        Raises:
            KernelInputError: as there.
        """
        pages = self.pages
        if self._device is None:
            pages.export_layer(
                layer, block_ids, token_start=token_start, out=out, encoding=encoding
            )
            return
        num_tokens = out.shape[1] if out.dim() > 1 else 0
        checks.check_index("block_ids", block_ids, _HOST)
        room = len(block_ids) * pages.geometry.block_size
        checks.check_range(token_start, num_tokens, room=room)
        checks.check_within("block id", block_ids, pages.num_blocks)
        shape, dtype = pages.layer_shape(num_tokens, encoding), pages.row_dtype(encoding)
        checks.check_tokens("out", out, shape, dtype, _HOST)
        buffer = self._free_buffer(out.numel() * out.element_size())
        staged = buffer.view(tuple(out.shape), out.dtype)
        with self._after(after):
            there = torch.empty_like(out, device=pages.device)
            pages.export_layer(
                layer,
                block_ids.to(pages.device, non_blocking=True),
                token_start=token_start,
                out=there,
                encoding=encoding,
                checked=True,
            )
            staged.copy_(there, non_blocking=True)
            done = self._stream.record_event()
        done.synchronize()
        out.copy_(staged)

    def wait_for_layer(self, layer: int) -> None:
        """Let the current stream go on only when the layer's imports so far are in its pages."""
        event = self._imported.get(layer)
        if event is not None and self._device is not None and not event.query():
            self._device.current_stream().wait_event(event)

    def wait_for_layers(self) -> None:
        """`wait_for_layer` for all of them."""
        for layer in list(self._imported):
            self.wait_for_layer(layer)

    def _slots_there(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """On the device; sent once for all layers of an import."""
        if self._slots is None or self._slots[0] is not slot_mapping:
            self._slots = (slot_mapping, slot_mapping.to(self.pages.device, non_blocking=True))
        return self._slots[1]

    @contextlib.contextmanager
    def _after(self, mark: Mark) -> Iterator[None]:
        assert self._device is not None
        if mark is None:
            self._device.synchronize()
        else:
            self._stream.wait_event(mark)
        with self._device.use(self._stream):
            yield

    def _free_buffer(self, num_bytes: int) -> _Buffer:
        """The buffer that was used longest ago, once the device has read it."""
        assert self._device is not None
        if len(self._buffers) < _NUM_BUFFERS:
            self._buffers.append(_Buffer(self._device.pinned(num_bytes)))
            return self._buffers[-1]
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        buffer = self._buffers[self._turn]
        if buffer.read is not None:
            buffer.read.synchronize()
        if len(buffer.memory) < num_bytes:
            buffer.memory = self._device.pinned(num_bytes)
        return buffer


def _device_of(pages: KvPages) -> Device | None:
    return CudaDevice(pages.device) if pages.device.type == "cuda" else None
