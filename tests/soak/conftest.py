"""What takes long: servers of each test's own, started as the server tests do."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator

import pytest
from marked_processes import marked
from server.conftest import model_folder, start_server

__all__ = ["model_folder", "start_server"]


@pytest.fixture
def mark() -> Iterator[str]:
    """A value for `MARK` in the environment of what a test starts; what is left of it is ended."""
    value = uuid.uuid4().hex
    yield value
    for pid in marked(value):
        os.kill(pid, signal.SIGKILL)
