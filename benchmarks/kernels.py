"""Bytes per second of import and export against a memcpy of the same run.

    python -m benchmarks.kernels                     # SmolLM2's pages, as vLLM packs them here
    python -m benchmarks.kernels --packing vec --dtype float16 --threads 2
    python -m benchmarks.kernels --gpu               # on a CUDA machine: tests, this, and a chat

Every round runs each row once, and medians are compared. On a CPU memcpy runs on one thread. Bytes
are of KV in the pages' dtype, counted once, also where the artifact is smaller. Nothing is
reported when a result differs from the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from memos_vllm_kernels import (
    Encoding,
    KvPages,
    Packing,
    RotaryTable,
    Rotation,
    export_blocks,
    import_blocks,
    slot_mapping,
    supported,
    unpinned_thread,
)
from memos_vllm_kernels.encoding import decode, encode
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH
from memos_vllm_kernels.rotary import rotate_keys

_MEMCPY = "memcpy"
# Twice what one rounding to bfloat16 moves numbers around 1, whose pairs are added.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def main() -> int:
    options = _parse()
    if options.gpu and not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    if options.gpu and (failed := _run_gpu_tests()):
        return failed
    dtype: torch.dtype = getattr(torch, options.dtype)
    page_shape = (options.heads, options.block_size, 2 * options.head_dim)
    print(json.dumps({"machine": _machine(options.gpu), "options": vars(options)}))
    for packing in _packings(options, page_shape, dtype):
        if (reason := supported((1, *page_shape), dtype, packing)) is not None:
            print(f"{packing.value}: not measured, {reason}")
            continue
        bench = Bench(packing, dtype, options)
        if (wrong := bench.wrong()) is not None:
            print(f"{packing.value}: {wrong} differs from the reference; nothing is reported")
            return 1
        for threads in [1] if options.gpu else options.threads:
            print(json.dumps(bench.measure(threads)))
    return 0


@dataclass(frozen=True)
class Row:
    """One thing that is timed, and the threads that it may use."""

    run: Callable[[], object]
    threads: int


class Bench:
    """Pages in service: four times the blocks that are used, and those in random order."""

    def __init__(self, packing: Packing, dtype: torch.dtype, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self._packing, self._dtype, self._options = packing, dtype, options
        self._device = torch.device("cuda" if options.gpu else "cpu")
        tokens, size, dim = options.tokens, options.block_size, options.head_dim
        num_blocks = -(-tokens // size)
        page = (4 * num_blocks, options.heads, size, 2 * dim)
        self._pages = KvPages.of(
            [torch.zeros(page, dtype=dtype, device=self._device) for _ in range(options.layers)],
            packing,
        )
        self._ids = torch.randperm(4 * num_blocks)[:num_blocks].to(self._device)
        self._slots = slot_mapping(self._ids, size, num_tokens=tokens)
        shape = (options.layers, 2, tokens, options.heads, dim)
        self._kv = torch.randn(shape).to(dtype).to(self._device)
        self._out = torch.full_like(self._kv, float("nan"))
        self._copy = torch.empty_like(self._kv)
        table = RotaryTable.of(10_000.0 ** -(torch.arange(0, dim, 2) / dim))
        self._rotation = Rotation(torch.randint(0, 3000, (tokens,)).to(self._device), table)
        encodings = [encoding for encoding in Encoding if encoding is not Encoding.EXACT]
        self._rows = {
            encoding: torch.empty(
                (options.layers, *self._pages.layer_shape(tokens, encoding)),
                dtype=torch.uint8,
                device=self._device,
            )
            for encoding in encodings
        }

    def wrong(self) -> str | None:
        """The first result that is not what the reference says, or None."""
        self._import()
        self._export()
        if not self._same(self._out, self._kv):
            return "export after import"
        self._import(rotation=self._rotation)
        self._export()
        turned = rotate_keys(self._kv[0, 0], self._rotation.deltas, self._rotation.table)
        gap = (self._out[0, 0].float() - turned.float()).abs().max()
        if not gap <= _TOLERANCE[self._dtype] or not self._same(self._out[0, 1], self._kv[0, 1]):
            return "import with turned keys"
        for encoding, rows in self._rows.items():
            self._import()
            self._export(encoding)
            wanted = encode(self._kv[0, 0], encoding)
            if not torch.equal(rows[0, 0], wanted):
                return f"{encoding.value} export"
            self._import(encoding)
            self._export()
            dim = self._options.head_dim
            if not self._same(
                self._out[0, 0], decode(wanted, encoding, head_dim=dim, dtype=self._dtype)
            ):
                return f"{encoding.value} import"
        return None

    def measure(self, threads: int) -> dict[str, object]:
        """Medians in GB/s (10^9 bytes of exact KV, counted once) and shares of memcpy.

        Args:
            threads: of imports and exports, on a CPU.
        """
        rows = self._timed_rows(threads)
        samples: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(self._options.repeats + 1):
            for name, row in rows.items():
                with self._threads(row.threads):
                    self._synchronize()
                    started = time.perf_counter()
                    row.run()
                    self._synchronize()
                    samples[name].append(time.perf_counter() - started)
        # The first round pays for page faults.
        medians = {name: statistics.median(times[1:]) for name, times in samples.items()}
        size_bytes = self._kv.numel() * self._dtype.itemsize
        return {
            "packing": self._packing.value,
            "threads": threads,
            "gb_per_second": {name: round(size_bytes / s / 1e9, 2) for name, s in medians.items()},
            "of_memcpy": {name: round(medians[_MEMCPY] / s, 3) for name, s in medians.items()},
            **self._of_peak(size_bytes / medians[_MEMCPY]),
            "milliseconds": {
                name: [round(1000 * s, 2) for s in times[1:]] for name, times in samples.items()
            },
        }

    def _timed_rows(self, threads: int) -> dict[str, Row]:
        integer = INTEGER_OF_WIDTH[self._dtype.itemsize]
        rows = {
            _MEMCPY: Row(lambda: self._copy.view(integer).copy_(self._kv.view(integer)), 1),
            "import": Row(self._import, threads),
            "import, turned": Row(lambda: self._import(rotation=self._rotation), threads),
            "export": Row(self._export, threads),
        }
        for encoding in self._rows:
            name = encoding.value
            rows[f"import {name}"] = Row(lambda of=encoding: self._import(of), threads)
            rows[f"export {name}"] = Row(lambda of=encoding: self._export(of), threads)
        return rows

    def _import(
        self, encoding: Encoding = Encoding.EXACT, *, rotation: Rotation | None = None
    ) -> None:
        source = self._rows.get(encoding, self._kv)
        import_blocks(self._pages, source, self._slots, encoding=encoding, rotation=rotation)

    def _export(self, encoding: Encoding = Encoding.EXACT) -> None:
        target = self._rows.get(encoding, self._out)
        export_blocks(self._pages, self._ids, self._options.tokens, target, encoding=encoding)

    def _same(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        integer = INTEGER_OF_WIDTH[self._dtype.itemsize]
        return torch.equal(left.view(integer), right.view(integer))

    def _threads(self, count: int) -> AbstractContextManager[None]:
        return nullcontext() if self._options.gpu else unpinned_thread(num_threads=count)

    def _synchronize(self) -> None:
        if self._options.gpu:
            torch.cuda.synchronize()

    def _of_peak(self, memcpy_bytes_per_second: float) -> dict[str, object]:
        """On a GPU, what a copy reaches of the memory's peak: it reads and writes."""
        if not self._options.gpu:
            return {}
        properties = torch.cuda.get_device_properties(self._device)
        # Kilohertz, and two transfers a cycle.
        peak = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
        return {
            "memory_peak_gb_per_second": round(peak / 1e9),
            "memcpy_of_peak": round(2 * memcpy_bytes_per_second / peak, 3),
        }


def _run_gpu_tests() -> int:
    """The kernels' tests on the GPU instead of the interpreter, then chats with a real server."""
    suites = (
        ["tests/unit/test_kernels_triton.py", "tests/unit/test_engine_layouts.py"],
        ["tests/exactness/test_smaller_artifacts.py", "tests/server/test_chat.py"],
    )
    for suite in suites:
        print(f"running {' '.join(suite)}", file=sys.stderr)
        environment = {**os.environ, "MEMOS_TEST_DEVICE": "cuda"}
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *suite], env=environment, check=False
        ).returncode
        if code:
            return code
    return 0


def _packings(
    options: argparse.Namespace, page_shape: tuple[int, int, int], dtype: torch.dtype
) -> list[Packing]:
    """What was asked for, or what vLLM's attention would choose on this machine."""
    if options.packing:
        return [Packing(options.packing)]
    if options.gpu:
        return [Packing.PLAIN]
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, block_size, fused = page_shape
    return [Packing.from_isa(_get_attn_isa(dtype, block_size, fused // 2))]


def _machine(gpu: bool) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": model or platform.processor(),
        **({"gpu": torch.cuda.get_device_name()} if gpu else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packing", choices=[packing.value for packing in Packing])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, len(os.sched_getaffinity(0))}),
        help="of import and export, on a CPU (1, and as many as there are)",
    )
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--gpu", action="store_true", help="tests, bandwidth and a chat on a CUDA device"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
