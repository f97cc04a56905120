"""Bytes per second of import and export against memcpy in the same run.

    python benchmarks/kernels.py                     # SmolLM2's pages, as vLLM packs them here
    python benchmarks/kernels.py --packing vec --dtype float16 --threads 2

memcpy always runs on one thread, so that the ratios are those of the issue; every run of one is
followed by a run of the others, and medians are compared. Nothing is reported when a bit differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memos_vllm_kernels import (
    KvPages,
    Packing,
    export_blocks,
    import_blocks,
    slot_mapping,
    supported,
    unpinned_thread,
)
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH


def main() -> int:
    options = _parse()
    dtype: torch.dtype = getattr(torch, options.dtype)
    page_shape = (options.heads, options.block_size, 2 * options.head_dim)
    packings = [Packing(options.packing)] if options.packing else _packings_here(page_shape, dtype)
    print(json.dumps({"machine": _machine(), "options": vars(options)}))
    for packing in packings:
        if (reason := supported((1, *page_shape), dtype, packing)) is not None:
            print(f"{packing.value}: not measured, {reason}")
            continue
        result = _measure(packing, dtype, page_shape, options)
        if result is None:
            print(f"{packing.value}: export after import differs; nothing is reported")
            return 1
        print(json.dumps(result))
    return 0


def _measure(
    packing: Packing,
    dtype: torch.dtype,
    page_shape: tuple[int, int, int],
    options: argparse.Namespace,
) -> dict[str, object] | None:
    """Medians in GB/s (10^9 canonical bytes, counted once) and ratios; None when a bit differs."""
    torch.manual_seed(0)
    num_blocks = -(-options.tokens // options.block_size)
    integer = INTEGER_OF_WIDTH[dtype.itemsize]
    # Four times the blocks that are used, and those in random order, as in a pool in service.
    pages = KvPages.of(
        [torch.zeros((4 * num_blocks, *page_shape), dtype=dtype) for _ in range(options.layers)],
        packing,
    )
    block_ids = torch.randperm(4 * num_blocks)[:num_blocks]
    slots = slot_mapping(block_ids, options.block_size, num_tokens=options.tokens)
    shape = (options.layers, 2, options.tokens, options.heads, options.head_dim)
    limits = torch.iinfo(integer)
    kv = torch.randint(limits.min, limits.max, shape, dtype=integer).view(dtype)
    out, copy = torch.full_like(kv, float("nan")), torch.empty_like(kv)

    def memcpy() -> None:
        copy.view(integer).copy_(kv.view(integer))

    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "memcpy": (1, memcpy),
        "import": (options.threads, lambda: import_blocks(pages, kv, slots)),
        "export": (options.threads, lambda: export_blocks(pages, block_ids, options.tokens, out)),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats + 1):
        for name, (threads, run) in runs.items():
            with unpinned_thread(num_threads=threads):
                started = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - started)
    if not torch.equal(out.view(integer), kv.view(integer)):
        return None
    # The first round pays for page faults.
    medians = {name: statistics.median(times[1:]) for name, times in samples.items()}
    size_bytes = kv.numel() * dtype.itemsize
    return {
        "packing": packing.value,
        "gb_per_second": {name: round(size_bytes / s / 1e9, 2) for name, s in medians.items()},
        "of_memcpy": {name: round(medians["memcpy"] / s, 3) for name, s in medians.items()},
        "milliseconds": {
            name: [round(1000 * s, 2) for s in times[1:]] for name, times in samples.items()
        },
    }


def _packings_here(page_shape: tuple[int, int, int], dtype: torch.dtype) -> list[Packing]:
    """What vLLM's CPU attention would choose on this machine."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, block_size, fused = page_shape
    return [Packing.from_isa(_get_attn_isa(dtype, block_size, fused // 2))]


def _machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packing", choices=[packing.value for packing in Packing])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="of import and export")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
