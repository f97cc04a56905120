"""Processes that descend from one that a test has started, known by a mark in the environment."""

from __future__ import annotations

from pathlib import Path

MARK = "MEMOS_TEST_MARK"


def marked(mark: str) -> list[int]:
    """The live processes that inherited this mark."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found
