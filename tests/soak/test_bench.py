"""`memos-vllm bench ttft` on real servers: one round, what it leaves behind, and its report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marked_processes import MARK, marked

from memos_vllm.bench.record import Record, read_record

# Three servers, of which one starts five times, on a machine that may be slow.
pytestmark = pytest.mark.timeout(2400)
ROWS = (
    *("no-memory", "direct", "apc-warm", "apc-flooded", "memos-resident"),
    *("memos-flooded", "memos-store", "memos-restart", "memos-restart-cold", "memos-int8"),
)


def bench(record: Path, mark: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "memos_vllm.cli.main", "bench", "ttft"]
    return subprocess.Popen(
        [*command, "--memory", "1024", "--query", "short", "-o", str(record), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: mark},
    )


def begun(record: Path) -> bool:
    return record.exists() and bool(read_record(record).samples)


@pytest.fixture(scope="module")
def measured(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    path = tmp_path_factory.mktemp("bench") / "run.json"
    rows = [argument for row in ROWS for argument in ("--situation", row)]
    running = bench(path, "bench", "--rounds", "1", "--no-costs", "--no-load", *rows)
    try:
        said, _ = running.communicate()
    finally:
        # Asked to stop, it stops its servers.
        running.terminate()
    assert running.returncode == 0, said
    assert "fewer than 9 rounds" in said
    assert "Where memory loses" in said
    return read_record(path)


def test_every_row_shows_what_it_claims(measured: Record) -> None:
    assert [one for one in measured.samples if one.fault] == []
    assert sorted(one.situation for one in measured.samples) == sorted(ROWS)
    assert measured.complete


def test_the_answers_of_every_row_pass_the_yardstick(measured: Record) -> None:
    judged = {one.situation: one.fault for one in measured.verdicts}
    assert judged == {row: "" for row in ROWS if row.startswith("memos-")}


def test_bakes_and_what_the_servers_took_are_in_the_record(measured: Record) -> None:
    sizes = {one.server: one.size_bytes for one in measured.builds}
    assert sizes["memos-int8"] < 0.6 * sizes["memos"]
    assert {one.server for one in measured.footprints} == {"plain", "memos", "memos-int8"}
    assert all(one.peak_bytes > one.pool_bytes > 10**8 for one in measured.footprints)


def test_an_interrupted_run_ends_its_servers_and_leaves_what_it_measured(
    model_folder: Path, tmp_path: Path, mark: str
) -> None:
    record = tmp_path / "run.json"
    running = bench(
        record, mark, "--situation", "memos-resident", "--no-probes", "--no-costs", "--no-load"
    )
    deadline = time.monotonic() + 900
    while not begun(record) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=240)
    assert running.returncode == 130, said
    left = read_record(record)
    assert left.samples
    assert not left.complete
    assert marked(mark) == []
