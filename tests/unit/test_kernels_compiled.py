"""The Triton kernels compile ahead of time for every target, and to what they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The command's table; a process of its own, since Triton interprets in this one."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "memos_vllm_kernels.compiled"],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_kernel_compiles_for_every_target(rows: list[list[str]]) -> None:
    kernels, targets = {row[0] for row in rows}, {row[1] for row in rows}
    forms = ("", ", turned (neox)", ", turned (interleaved)")
    assert kernels == {
        name
        for suffix in ("", " int8", " int4", " fp8")
        for name in (f"export{suffix}", *(f"import{suffix}{form}" for form in forms))
    }
    assert targets == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(rows) == len(kernels) * len(targets)


def test_no_kernel_spills_registers_or_needs_much_shared_memory(rows: list[list[str]]) -> None:
    for kernel, target, registers, spilled, shared, *_ in rows:
        assert spilled == "0 B", (kernel, target)
        # Of 255; more than half would leave too few warps to hide the memory's latency.
        assert int(registers) <= 128, (kernel, target)
        assert int(shared.removesuffix(" B")) <= 16_384, (kernel, target)


def test_pages_move_sixteen_bytes_at_a_time(rows: list[list[str]]) -> None:
    """The narrow accesses fetch slots and layer addresses, and rows that no alignment allows more
    for."""
    for kernel, target, *_, accesses, _excess in rows:
        wide, total = map(int, accesses.split(" of "))
        is_copy = not any(name in kernel for name in ("int8", "int4", "fp8"))
        # A warp of gfx942 is twice as wide.
        assert wide >= (2 if target == "gfx942" else 4) * (2 if is_copy else 1), (kernel, target)
        if is_copy:
            assert total - wide <= 7, (kernel, target)


def test_a_copy_moves_little_more_than_its_numbers(rows: list[list[str]]) -> None:
    copies = [row for row in rows if row[0] in ("export", "import")]
    assert len(copies) == 8
    for kernel, target, *_, excess in copies:
        assert 1 <= float(excess) <= 1.05, (kernel, target)
