"""The fast tests first: those that need a server run after all others."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """End a run that is told to stop as Ctrl-C does: the servers that it started are stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order within both halves."""
    items.sort(key=lambda item: item.get_closest_marker("server") is not None)
