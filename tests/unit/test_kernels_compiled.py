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
    assert kernels == {
        "export",
        "import",
        "import, turned (neox)",
        "import, turned (interleaved)",
    }
    assert targets == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(rows) == len(kernels) * len(targets)


def test_no_kernel_spills_registers_or_needs_much_shared_memory(rows: list[list[str]]) -> None:
    for kernel, target, registers, spilled, shared, *_ in rows:
        assert spilled == "0 B", (kernel, target)
        # Of 255; more than half would leave too few warps to hide the memory's latency.
        assert int(registers) <= 128, (kernel, target)
        assert int(shared.removesuffix(" B")) <= 16_384, (kernel, target)


def test_kv_moves_sixteen_bytes_at_a_time(rows: list[list[str]]) -> None:
    """The narrow ones fetch slots and layer addresses, a few for each program."""
    for kernel, target, *_, accesses in rows:
        wide, total = map(int, accesses.split(" of "))
        assert wide >= 8, (kernel, target)
        assert total - wide <= 7, (kernel, target)
