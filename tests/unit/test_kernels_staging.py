"""Layers pass through pinned staging on a stream of their own, and the model waits for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from bit_patterns import any_bits, bits

from memos_vllm_kernels import (
    Encoding,
    KernelInputError,
    KvPages,
    Packing,
    PageMover,
    export_blocks,
)

LAYERS, BLOCKS, HEADS, SIZE, DIM = 4, 6, 2, 16, 64
SLOTS = torch.arange(40)


@dataclass
class Event:
    name: str
    log: list[str]
    done: bool = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")
        self.done = True


@dataclass
class Stream:
    name: str
    log: list[str]
    events: list[Event] = field(default_factory=list)

    def record_event(self) -> Event:
        self.events.append(Event(f"{self.name} {len(self.events)}", self.log))
        return self.events[-1]

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class FakeDevice:
    """Copies at once, and keeps what a GPU would have been told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.model = Stream("model", self.log)
        self.copies = Stream("copies", self.log)
        self.pinned_bytes: list[int] = []

    def stream(self) -> Stream:
        return self.copies

    def current_stream(self) -> Stream:
        return self.model

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.pinned_bytes.append(num_bytes)
        # What is not written would be seen.
        return torch.full((num_bytes,), 0xEE, dtype=torch.uint8)

    def synchronize(self) -> None:
        self.log.append("everything is waited for")


def pages_of(seed: int = 1) -> KvPages:
    shape = (BLOCKS, HEADS, SIZE, 2 * DIM)
    tensors = [any_bits(*shape, dtype=torch.bfloat16, seed=seed + i) for i in range(LAYERS)]
    return KvPages.of(tensors, Packing.PLAIN)


def kv_of(pages: KvPages, *, seed: int = 9) -> torch.Tensor:
    shape = pages.layer_shape(len(SLOTS), Encoding.EXACT)
    return any_bits(LAYERS, *shape, dtype=torch.bfloat16, seed=seed)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def mover(device: FakeDevice) -> PageMover:
    return PageMover(pages_of(), device_of=lambda _: device)


def test_on_a_cpu_layers_are_there_at_once() -> None:
    mover = PageMover(pages_of())
    kv = kv_of(mover.pages)
    assert mover.mark() is None
    for layer in range(LAYERS):
        mover.import_layer(layer, kv[layer], SLOTS, after=mover.mark())
    mover.wait_for_layers()
    out = torch.empty_like(kv)
    for layer in range(LAYERS):
        mover.export_layer(layer, torch.tensor([0, 1, 2]), out=out[layer])
    assert torch.equal(bits(out), bits(kv))


def test_staged_layers_hold_what_was_given(mover: PageMover) -> None:
    kv = kv_of(mover.pages)
    for layer in range(LAYERS):
        given = kv[layer].clone()
        mover.import_layer(layer, given, SLOTS, after=mover.mark())
        given.zero_()  # it may be dropped: the staging has its numbers
    found = export_blocks(mover.pages, torch.tensor([0, 1, 2]), len(SLOTS))
    assert torch.equal(bits(torch.as_tensor(found)), bits(kv))
    out = torch.empty_like(kv)
    for layer in range(LAYERS):
        mover.export_layer(layer, torch.tensor([0, 1, 2]), out=out[layer], after=mover.mark())
    assert torch.equal(bits(out), bits(kv))


def test_copies_come_after_what_the_model_was_given(mover: PageMover, device: FakeDevice) -> None:
    mark = mover.mark()
    mover.import_layer(0, kv_of(mover.pages)[0], SLOTS, after=mark)
    assert device.log == ["copies waits for model 0", "on copies"]
    device.log.clear()
    mover.import_layer(1, kv_of(mover.pages)[1], SLOTS)
    assert device.log == ["everything is waited for", "on copies"]


def test_the_model_waits_for_one_layer_and_only_while_it_is_under_way(
    mover: PageMover, device: FakeDevice
) -> None:
    kv, mark = kv_of(mover.pages), mover.mark()
    for layer in range(LAYERS):
        mover.import_layer(layer, kv[layer], SLOTS, after=mark)
    device.log.clear()
    mover.wait_for_layer(2)
    assert device.log == ["model waits for copies 2"]
    device.log.clear()
    device.copies.events[2].done = True
    mover.wait_for_layer(2)
    mover.wait_for_layer(LAYERS)
    assert device.log == []
    # The first two are through as well: the others needed their buffers.
    mover.wait_for_layers()
    assert device.log == ["model waits for copies 3"]
    # A later import of a layer that was there is waited for again.
    device.log.clear()
    mover.import_layer(2, kv[2], SLOTS, after=mark)
    mover.wait_for_layer(2)
    assert device.log[-1] == "model waits for copies 4"


def test_a_buffer_is_filled_again_only_when_the_device_has_read_it(
    mover: PageMover, device: FakeDevice
) -> None:
    kv, mark = kv_of(mover.pages), mover.mark()
    for layer in range(3):
        mover.import_layer(layer, kv[layer], SLOTS, after=mark)
    assert len(device.pinned_bytes) == 2
    assert [line for line in device.log if line.startswith("host")] == ["host waits for copies 0"]


def test_what_does_not_fit_is_refused_before_anything_is_copied(
    mover: PageMover, device: FakeDevice
) -> None:
    kv = kv_of(mover.pages)[0]
    before = [page.clone() for page in mover.pages._pages]
    for wrong, slots in (
        (kv[:, :3], SLOTS),
        (kv.float(), SLOTS),
        (kv, SLOTS + BLOCKS * SIZE),
        (kv, SLOTS - 1),
        (kv, SLOTS[:, None]),
        (kv, SLOTS.int()),
    ):
        with pytest.raises(KernelInputError):
            mover.import_layer(0, wrong, slots, after=mover.mark())
    for ids, token_start in ((torch.tensor([0, 1, BLOCKS]), 0), (torch.tensor([0, 1]), 0)):
        with pytest.raises(KernelInputError):
            mover.export_layer(0, ids, out=kv.clone(), token_start=token_start)
    with pytest.raises(KernelInputError):
        mover.export_layer(0, torch.tensor([0, 1, 2]), out=kv.clone(), token_start=-1)
    assert device.log == []
    for page, was in zip(mover.pages._pages, before, strict=True):
        assert torch.equal(bits(page), bits(was))


def test_encoded_layers_are_staged_as_they_are_written(
    mover: PageMover, device: FakeDevice
) -> None:
    shape = mover.pages.layer_shape(len(SLOTS), Encoding.INT8)
    rows = torch.zeros(shape, dtype=torch.uint8)
    mover.import_layer(0, rows, SLOTS, encoding=Encoding.INT8, after=mover.mark())
    assert device.pinned_bytes == [rows.numel()]
    found = torch.as_tensor(export_blocks(mover.pages, torch.tensor([0, 1, 2]), len(SLOTS)))
    assert not found[0].any()
