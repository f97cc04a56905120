"""What the Triton kernels compile to, without a GPU: `python -m memos_vllm_kernels.compiled`.

Prints a Markdown table with a row for each kernel and target: registers, spills, shared memory,
instructions, and how wide memory is accessed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memos_vllm_kernels import triton_pages

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    "layer_table": "*i64",
    "tokens": "*i16",
    "slot_mapping": "*i64",
    "block_ids": "*i64",
    "cosines": "*fp32",
    "sines": "*fp32",
}
# What a launch specialises on: multiples of 16, as page strides are.
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is launched for bfloat16 pages of 128 dims."""

    name: str
    kernel: Any
    constants: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one variant became on one target.

    Attributes:
        spilled_bytes: of registers, into local memory.
        wide, narrow: memory instructions of 16 bytes a thread, and those of less.
    """

    variant: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    wide: int
    narrow: int


def variants(*, head_dim: int = 128) -> Iterator[Variant]:
    """The kernels in every form that a launch can choose for aligned pages."""
    common = {
        "head_dim": head_dim,
        "dim_lanes": triton.next_power_of_2(head_dim),
        "element": tl.int16,
        "aligned": True,
        "token_lanes": triton_pages._TOKENS_PER_PROGRAM,
    }
    yield Variant("export", triton_pages.export_kernel, common)
    half = head_dim // 2
    for name, half_rotary, interleaved in (
        ("import", 0, False),
        ("import, turned (neox)", half, False),
        ("import, turned (interleaved)", half, True),
    ):
        constants = {
            **common,
            "half_rotary": half_rotary,
            "pair_lanes": triton.next_power_of_2(max(half_rotary, 1)),
            "interleaved": interleaved,
            "number": tl.bfloat16,
        }
        yield Variant(name, triton_pages.import_kernel, constants)


def compile_for(variant: Variant, target: str) -> Compiled:
    """Compile for a target that need not be there.

    Raises:
        Exception: whatever Triton raises when the kernel does not compile.
    """
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else _POINTERS.get(name, "i32")
        for name in names
    }
    divisible = {
        (index,): _DIVISIBLE
        for index, name in enumerate(names)
        if name in _POINTERS or "stride" in name or name == "block_size"
    }
    source = ASTSource(variant.kernel, signature, variant.constants, divisible)
    built = triton.compile(source, target=TARGETS[target])
    shared = int(built.metadata.shared)
    if TARGETS[target].backend == "hip":
        return _read_amd(variant.name, target, built.asm["amdgcn"], shared)
    return _read_nvidia(variant.name, target, built.asm["cubin"], shared)


def _read_nvidia(name: str, target: str, cubin: bytes, shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        sass = _tool("cuobjdump", "-sass", str(path))
    memory = re.findall(r"\b(?:LDG|STG)\.\S+", sass)
    wide = sum(".128" in instruction for instruction in memory)
    return Compiled(
        name,
        target,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spilled_bytes=int(re.search(r"LOCAL:(\d+)", usage)[1])  # type: ignore[index]
        + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4}\*/\s+[@A-Z]", sass)),
        wide=wide,
        narrow=len(memory) - wide,
    )


def _read_amd(name: str, target: str, assembly: str, shared: int) -> Compiled:
    memory = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_(\S+)", assembly)
    wide = sum(width == "dwordx4" for width in memory)
    return Compiled(
        name,
        target,
        registers=int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),  # type: ignore[index]
        spilled_bytes=4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),  # type: ignore[index]
        shared_bytes=shared,
        instructions=len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|flat|ds)_", assembly, re.M)),
        wide=wide,
        narrow=len(memory) - wide,
    )


def _tool(name: str, *arguments: str) -> str:
    """A CUDA tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    print("| kernel | target | registers | spilled | shared | instructions | 16-byte accesses |")
    print("|---|---|---|---|---|---|---|")
    for variant in variants():
        for target in TARGETS:
            found = compile_for(variant, target)
            print(
                f"| {found.variant} | {target} | {found.registers} | {found.spilled_bytes} B "
                f"| {found.shared_bytes} B | {found.instructions} "
                f"| {found.wide} of {found.wide + found.narrow} |"
            )


if __name__ == "__main__":
    main()
