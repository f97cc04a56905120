"""The worker half, driven end to end, on pages as every attention backend of vLLM declares them.

The pages are vLLM's own views, made by its own functions from the spec that the backend asks for.
The kernels are those of a GPU, interpreted.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.v1.attention
from bit_patterns import any_bits, bits
from store_samples import MAC_KEY
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from memos_vllm.activation.store import ArtifactStore, PrefixIdentity
from memos_vllm.engine.pages import packing_of
from memos_vllm.engine.transfer import LoadJob, SaveJob
from memos_vllm.engine.worker_half import RankShape, WorkerHalf
from memos_vllm_kernels import KvPages, Packing, UnsupportedLayout

pytestmark = pytest.mark.usefixtures("on_device")

NUM_BLOCKS, BLOCK, HEADS, DIM, LAYERS = 8, 32, 2, 64, 2
TOKENS = tuple(range(3 * BLOCK))
IDENTITY = PrefixIdentity("00" * 16, "11" * 32, "gpu", 1)
# What the rest of vLLM may choose for a backend that takes any layout.
ANY_LAYOUT = tuple(KVCacheLayout)


def declared() -> Iterator[tuple[str, tuple[KVCacheLayout, ...]]]:
    """Every backend's name or file, and the layouts that it declares.

    Read from the source, because most backends can be imported only where they run.
    """
    folder = Path(vllm.v1.attention.__file__).parent / "backends"
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "supported_kv_cache_layouts":
                names = {
                    inner.attr
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Attribute)
                    and isinstance(inner.value, ast.Name)
                    and inner.value.id == "KVCacheLayout"
                }
                if names:
                    yield path.stem, tuple(KVCacheLayout[name] for name in sorted(names))


DECLARED = [*declared(), ("flash_attn, triton_attn and others", ANY_LAYOUT)]


def spec(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16, **changes
    )


SPLIT = {"num_head_slots": 2, "state_content_bytes": HEADS * DIM * 2}


def views(spec: FullAttentionSpec, layout: KVCacheLayout, *, seed: int) -> list[torch.Tensor]:
    """The layers' pages, made by vLLM."""
    shape = compute_layer_kv_cache_shape_bytes(spec, NUM_BLOCKS)
    size = LAYERS * int(torch.Size(shape).numel())
    strides = compute_layout_strides(spec, NUM_BLOCKS, LAYERS, layout)
    placed = KVCacheTensor(
        size=size,
        layers=[f"layers.{index}" for index in range(LAYERS)],
        layer_stride=strides[0],
        block_stride=strides[1],
    )
    raw = any_bits(size, dtype=torch.int8, seed=seed)
    return list(create_kv_cache_views(raw, spec, NUM_BLOCKS, layout, placed))


class Worker:
    def __init__(
        self, root: Path, spec: FullAttentionSpec, layout: KVCacheLayout, *, seed: int
    ) -> None:
        self.tensors = views(spec, layout, seed=seed)
        packing = packing_of(spec)
        pages = KvPages.of(self.tensors, packing, num_kv_heads=HEADS, kernels="triton")
        self.store = ArtifactStore(root / "store", mac_key=MAC_KEY)
        self.half = WorkerHalf(
            store=self.store, rank=RankShape(0, 0), open_pages=lambda: pages, block_size=BLOCK
        )

    def save(self, blocks: tuple[int, ...]) -> str:
        self.half.start_saves([SaveJob(1, IDENTITY, TOKENS, blocks)])
        (report,) = self._wait().saves
        assert report.error is None
        assert report.shard is not None
        return self.store.commit(
            IDENTITY, TOKENS, total_layers=LAYERS, total_kv_heads=HEADS, shards=[report.shard]
        ).key

    def load(self, artifact: str, blocks: tuple[int, ...]) -> None:
        self.half.start_loads([LoadJob("r", artifact, IDENTITY, 0, len(TOKENS), blocks)])
        (report,) = self._wait().loads
        assert report.error is None
        self.half.begin_step(layer_by_layer=True)
        for layer in range(LAYERS):
            self.half.wait_for_layer(layer)

    def _wait(self) -> Any:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.half.finished_loads()
            report = self.half.take_report()
            if report is not None:
                return report
            time.sleep(0.001)
        raise AssertionError("the worker did not answer")


def keys_of(tensors: list[torch.Tensor], packing: Packing, blocks: tuple[int, ...]) -> torch.Tensor:
    """As attention takes the pages apart, [layers, 2, blocks, kv_heads, block_size, head_dim]."""
    found = []
    for page in tensors:
        chosen = page[list(blocks)]
        if packing is Packing.PLANES:
            # B12X: unbind the slots, then unflatten the content.
            halves = [half.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for half in chosen.unbind(1)]
        else:
            # FlashAttention and the rest: split the content.
            halves = list(chosen.split(DIM, dim=-1))
        found.append(torch.stack(halves))
    return torch.stack(found)


@pytest.mark.parametrize("packing", [Packing.PLAIN, Packing.PLANES])
@pytest.mark.parametrize(("backend", "layouts"), DECLARED, ids=lambda value: str(value)[:24])
def test_kv_moves_between_any_two_layouts_that_a_backend_declares(
    tmp_path: Path, backend: str, layouts: tuple[KVCacheLayout, ...], packing: Packing
) -> None:
    wanted = spec(**SPLIT) if packing is Packing.PLANES else spec()
    assert packing_of(wanted) is packing
    for index, layout in enumerate(layouts):
        saver = Worker(tmp_path / f"{index}", wanted, layout, seed=1)
        artifact = saver.save((5, 0, 6))
        loader = Worker(tmp_path / f"{index}", spec(), layouts[index - 1], seed=2)
        before = [page.clone() for page in loader.tensors]
        loader.load(artifact, (1, 7, 2))
        found = keys_of(loader.tensors, Packing.PLAIN, (1, 7, 2))
        assert torch.equal(bits(found), bits(keys_of(saver.tensors, packing, (5, 0, 6))))
        for old, new in zip(before, loader.tensors, strict=True):
            untouched = [0, 3, 4, 5, 6]
            assert torch.equal(bits(old[untouched]), bits(new[untouched])), backend
        for worker in (saver, loader):
            worker.half.shutdown()


def test_every_backend_that_loads_here_asks_for_pages_that_are_known_or_refused() -> None:
    seen = {}
    for backend in AttentionBackendEnum:
        try:
            asked = backend.get_class().customize_spec(spec())
        except (ImportError, AttributeError, ValueError, AssertionError, RuntimeError, OSError):
            continue  # its own library, or its own kind of spec, is not here
        try:
            seen[backend.name] = packing_of(asked)
        except UnsupportedLayout:
            seen[backend.name] = None
    assert seen["FLASH_ATTN"] is Packing.PLAIN
    assert seen["TRITON_ATTN"] is Packing.PLAIN
    assert len(seen) >= 5


def test_pages_of_an_arrangement_that_nobody_knows_are_refused() -> None:
    for changes in (
        {"num_head_slots": 4, "state_content_bytes": 100},
        {"num_head_slots": 2, "state_content_bytes": 100},
        {"num_head_slots": 3},
    ):
        with pytest.raises(UnsupportedLayout, match="no known arrangement"):
            packing_of(spec(**changes))
