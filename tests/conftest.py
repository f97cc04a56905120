"""The fast tests first: those that need a server run after all others."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order within both halves."""
    items.sort(key=lambda item: item.get_closest_marker("server") is not None)
