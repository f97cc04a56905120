"""Servers of one module's own: started as the server tests do, and stopped with the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_server import ENVIRONMENT, OPTIONS, MemoryServer, write_unbaked_cubes
from server.conftest import model_folder, start_server

from memos_vllm.process import ServerProcess

__all__ = ["model_folder", "start_server"]

Launch = Callable[..., MemoryServer]
Note = Callable[[str], None]

_notes: list[str] = []


@pytest.fixture(scope="module")
def launch(
    start_server: Callable[..., ServerProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Launch]:
    """Start a server with options of its own, on data that holds `unbaked` cubes."""
    started: list[MemoryServer] = []

    def start(
        *options: str, unbaked: tuple[str, ...] = (), data_dir: Path | None = None
    ) -> MemoryServer:
        for other in started:
            # Two cores: one server at a time.
            other.close()
        data_dir = data_dir or tmp_path_factory.mktemp("data")
        write_unbaked_cubes(data_dir, unbaked)
        process = start_server(*OPTIONS, *options, data_dir=data_dir, environment=ENVIRONMENT)
        started.append(MemoryServer(process, data_dir))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def note() -> Note:
    """Say what was measured at the end of the run, also when everything passes."""
    return _notes.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _notes:
        terminalreporter.section("exactness, as measured in this run")
        for line in _notes:
            terminalreporter.write_line(line)
