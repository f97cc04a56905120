"""`memos-vllm demo`, played on the real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marked_processes import MARK, marked


def demo(folder: Path, mark: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "memos_vllm.cli.main", "demo"]
    return subprocess.Popen(
        [*command, "--quick", "--data-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: mark},
    )


@pytest.mark.timeout(900)
def test_the_demo_plays_to_its_end(model_folder: Path, tmp_path: Path, mark: str) -> None:
    playing = demo(tmp_path, mark)
    said, _ = playing.communicate()

    assert playing.returncode == 0, said
    table = {line[:32].strip(): line.split() for line in said.splitlines() if line[:1].isalpha()}
    assert table["from scratch"][-2] == "none"
    assert table["plain vLLM, warm prefix cache"][-3] == table["cube, resident"][-3] != "0"
    assert table["cube, resident"][-2] == "resident"
    assert table["plain vLLM, after the flood"][-3] == "0"
    assert table["cube, after the flood"][-3] == table["cube, resident"][-3]
    assert table["cube, first request after kill -"[:32]][-2] == "store"
    assert marked(mark) == []


@pytest.mark.timeout(300)
def test_an_interrupted_demo_leaves_nothing_behind(
    model_folder: Path, tmp_path: Path, mark: str
) -> None:
    playing = demo(tmp_path, mark)
    assert playing.stdout is not None
    for line in playing.stdout:
        if "Starting it" in line:
            break
    # Its first words come long after its start, before the engine's process.
    log = tmp_path / "server.log"
    while not (log.exists() and log.stat().st_size):
        assert playing.poll() is None
        time.sleep(0.05)

    playing.send_signal(signal.SIGINT)

    assert playing.wait(60) == 130
    assert "Interrupted" in playing.stdout.read()
    assert marked(mark) == []
