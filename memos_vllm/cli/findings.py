"""What a check of `memos-vllm doctor` finds, and what several of them look at."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum

PROBE_TIMEOUT_SECONDS = 180


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    name: str
    message: str


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; reads its metadata and imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_problem(module: str, *, after: str | None = None) -> str | None:
    """Why a module does not load, None when it does; another Python tries it, as it may crash.

    Args:
        after: a module to import first.
    """
    names = module if after is None else f"{after}, {module}"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", f"import {names}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "importing it takes minutes"
    if probe.returncode == 0:
        return None
    return (probe.stderr.strip().splitlines() or ["it crashes"])[-1]
