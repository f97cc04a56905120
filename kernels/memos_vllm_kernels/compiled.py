"""What the Triton kernels compile to, without a GPU: `python -m memos_vllm_kernels.compiled`.

Prints a Markdown table with a row for each kernel and target: registers, spills, shared memory,
instructions, the fewest bytes that must be read and written for one number of KV, how wide memory
is accessed, and for copies the bytes that a program moves over the fewest.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memos_vllm_kernels import triton_pages
from memos_vllm_kernels.encoding import Encoding

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    "layer_table": "*i64",
    "slot_mapping": "*i64",
    "block_ids": "*i64",
    "cosines": "*fp32",
    "sines": "*fp32",
}
# What a launch specialises on: multiples of 16, as page strides are.
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is launched for bfloat16 pages.

    Attributes:
        least_bytes: what a full program reads and writes of numbers and rows, each once.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    least_bytes: int

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.constants["encoding"])

    @property
    def least_bytes_a_number(self) -> float:
        """Read and written for one number of a key or value."""
        numbers: int = 2 * self.constants["token_lanes"] * self.constants["head_dim"]
        return self.least_bytes / numbers

    def excess(self, wide_accesses: int) -> float | None:
        """See `Compiled`."""
        if self.encoding is not Encoding.EXACT:
            return None
        addresses: int = 8 * (self.constants["token_lanes"] + 1)
        return (16 * wide_accesses + addresses) / self.least_bytes


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one variant became on one target.

    Attributes:
        spilled_bytes: of registers, into local memory.
        least: bytes that must be moved for one number of KV.
        wide, narrow: memory instructions of 16 bytes a thread, and those of less.
        excess: bytes that a full program moves, over `least_bytes`: the wide accesses of all its
            threads, each slot once and the layer's address. None of encoded rows, whose bytes
            are read by narrow accesses that a warp shares.
    """

    variant: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    least: float
    wide: int
    narrow: int
    excess: float | None


def variants(*, head_dim: int = 128) -> Iterator[Variant]:
    """The kernels in every form that a launch can choose for aligned pages."""
    for encoding in Encoding:
        suffix = "" if encoding is Encoding.EXACT else f" {encoding.value}"
        yield _variant(f"export{suffix}", encoding, head_dim)
        yield _variant(f"import{suffix}", encoding, head_dim, imports=True)
        for style in ("neox", "interleaved"):
            name = f"import{suffix}, turned ({style})"
            yield _variant(name, encoding, head_dim, imports=True, style=style)


def _variant(
    name: str, encoding: Encoding, head_dim: int, *, imports: bool = False, style: str = ""
) -> Variant:
    dim_lanes = triton_pages.dim_lanes_for(head_dim)
    token_lanes = triton_pages.token_lanes_for(head_dim, encoding)
    half_rotary = head_dim // 2 if style else 0
    constants = {
        "halves": 2,
        "head_dim": head_dim,
        "dim_lanes": dim_lanes,
        "encoding": encoding.value,
        "element": tl.int16,
        "number": tl.bfloat16,
        "aligned": True,
        "token_lanes": token_lanes,
    }
    if imports:
        constants |= {
            "first_pair": 0,
            "half_rotary": half_rotary,
            "pair_lanes": triton.next_power_of_2(max(half_rotary, 1)),
            "interleaved": style == "interleaved",
        }
    row_bytes = encoding.row_bytes(head_dim, dtype=torch.bfloat16)
    page_bytes = head_dim * torch.bfloat16.itemsize
    least = token_lanes * 2 * (row_bytes + page_bytes)
    # The angles of a token are read once for each head.
    least += token_lanes * half_rotary * 2 * torch.float32.itemsize
    kernel = triton_pages.import_kernel if imports else triton_pages.export_kernel
    return Variant(name, kernel, constants, least)


def compile_for(variant: Variant, target: str) -> Compiled:
    """Compile for a target that need not be there.

    Raises:
        Exception: whatever Triton raises when the kernel does not compile.
    """
    names = variant.kernel.arg_names
    pointers = _POINTERS | {"tokens": "*i16" if variant.encoding is Encoding.EXACT else "*u8"}
    signature = {
        name: "constexpr" if name in variant.constants else pointers.get(name, "i32")
        for name in names
    }
    divisible = {
        (index,): _DIVISIBLE
        for index, name in enumerate(names)
        if name in pointers or _is_multiple_of_16(name, variant.encoding)
    }
    source = ASTSource(variant.kernel, signature, variant.constants, divisible)
    built = triton.compile(source, target=TARGETS[target])
    shared = int(built.metadata.shared)
    threads = int(built.metadata.num_warps) * TARGETS[target].warp_size
    if TARGETS[target].backend == "hip":
        return _read_amd(variant, target, built.asm["amdgcn"], shared, threads)
    return _read_nvidia(variant, target, built.asm["cubin"], shared, threads)


def _is_multiple_of_16(name: str, encoding: Encoding) -> bool:
    """Strides of pages are, and those of tokens unless they are rows of odd widths."""
    if name.startswith("tokens_stride"):
        return encoding is Encoding.EXACT
    return "stride" in name or name == "block_size"


def _read_nvidia(
    variant: Variant, target: str, cubin: bytes, shared: int, threads: int
) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        sass = _tool("cuobjdump", "-sass", str(path))
    memory = re.findall(r"\b(?:LDG|STG)\.\S+", sass)
    wide = sum(".128" in instruction for instruction in memory)
    return Compiled(
        variant.name,
        target,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spilled_bytes=int(re.search(r"LOCAL:(\d+)", usage)[1])  # type: ignore[index]
        + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4}\*/\s+[@A-Z]", sass)),
        least=variant.least_bytes_a_number,
        wide=wide,
        narrow=len(memory) - wide,
        excess=variant.excess(wide * threads),
    )


def _read_amd(variant: Variant, target: str, assembly: str, shared: int, threads: int) -> Compiled:
    memory = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_([a-z0-9]+)", assembly)
    wide = memory.count("dwordx4")
    return Compiled(
        variant.name,
        target,
        registers=int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),  # type: ignore[index]
        spilled_bytes=4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),  # type: ignore[index]
        shared_bytes=shared,
        instructions=len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|flat|ds)_", assembly, re.M)),
        least=variant.least_bytes_a_number,
        wide=wide,
        narrow=len(memory) - wide,
        excess=variant.excess(wide * threads),
    )


def _tool(name: str, *arguments: str) -> str:
    """A CUDA tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    print(
        "| kernel | target | registers | spilled | shared | instructions | bytes a number "
        "| 16-byte accesses | bytes over the least |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in variants():
        for target in TARGETS:
            found = compile_for(variant, target)
            print(
                f"| {found.variant} | {target} | {found.registers} | {found.spilled_bytes} B "
                f"| {found.shared_bytes} B | {found.instructions} | {found.least:.2f} "
                f"| {found.wide} of {found.wide + found.narrow} "
                f"| {'' if found.excess is None else f'{found.excess:.3f}'} |"
            )


if __name__ == "__main__":
    main()
