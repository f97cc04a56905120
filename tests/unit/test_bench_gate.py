"""The gate closes when a ratio has worsened beyond noise, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from bench_kit import record_of, sample

from benchmarks import gate
from memos_vllm.bench.record import Record, write_record

ROUNDS = range(11)
WARM = [0.100 + 0.001 * (number % 3) for number in ROUNDS]


def run_of(factor: float, *, machine: str = "Example CPU") -> Record:
    """Memory this many times as slow as the warm prefix cache, in rounds that are noisy alike."""
    noisy = [seconds * (1.0 + 0.02 * (number % 4)) for number, seconds in enumerate(WARM)]
    record = record_of({"apc-warm": WARM, "memos-resident": [factor * s for s in noisy]})
    record.machine["cpu"] = machine
    return record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_record(run_of(1.0), tmp_path / "before.json")
    assert judged(tmp_path, "before.json", more=["--update"]) == 0
    return tmp_path


def judged(folder: Path, *names: str, more: Sequence[str] = ()) -> int:
    records = [str(folder / name) for name in names]
    return gate.main(["--baseline", str(folder / "gate.json"), "--record", *records, *more])


def test_the_same_ratio_passes_however_slow_the_machine_was(folder: Path) -> None:
    slow = run_of(1.0)
    slow.samples = [sample(one.situation, one.round, 7 * one.ttft_seconds) for one in slow.samples]
    write_record(slow, folder / "now.json")
    assert judged(folder, "now.json") == 0


def test_a_ratio_that_is_worse_beyond_its_interval_fails_and_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(run_of(1.2), folder / "now.json")
    assert judged(folder, "now.json") == 1
    assert "worse: memos-resident / apc-warm, 3,072 + 32" in capsys.readouterr().out


def test_what_lies_within_the_interval_or_is_better_passes(folder: Path) -> None:
    for number, factor in enumerate((1.03, 0.7)):
        write_record(run_of(factor), folder / f"{number}.json")
        assert judged(folder, f"{number}.json") == 0


def test_a_sample_that_shows_something_else_fails_whatever_its_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_of(0.5)
    record.samples.append(sample("memos-resident", 11, 0.01, fault="the connector says 'none'"))
    write_record(record, folder / "now.json")
    assert judged(folder, "now.json") == 1
    assert "the connector says 'none'" in capsys.readouterr().out


def test_another_kind_of_machine_has_no_baseline_until_it_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(run_of(3.0, machine="Other CPU"), folder / "now.json")
    assert judged(folder, "now.json") == 0
    assert "no baseline for Other CPU" in capsys.readouterr().out
    assert judged(folder, "now.json", more=["--update"]) == 0
    write_record(run_of(4.0, machine="Other CPU"), folder / "later.json")
    assert judged(folder, "later.json") == 1
    assert judged(folder, "before.json") == 0


def test_an_update_widens_the_baseline_and_forgets_no_run(folder: Path) -> None:
    write_record(run_of(1.2), folder / "now.json")
    assert judged(folder, "now.json", more=["--update"]) == 0
    assert judged(folder, "now.json") == 0
    assert judged(folder, "before.json") == 0


def test_a_ratio_of_the_baseline_that_was_not_measured_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(record_of({"direct": WARM}), folder / "now.json")
    assert judged(folder, "now.json") == 1
    assert "not measured" in capsys.readouterr().out


def test_a_run_with_a_fault_does_not_count_once_another_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = run_of(1.0)
    faulty.samples.append(sample("memos-resident", 11, 0.01, fault="HTTP 500"))
    runs = [faulty, run_of(1.0)]
    monkeypatch.setattr(gate, "measure", lambda _folder, number: runs[number])
    assert gate.main(["--baseline", str(folder / "gate.json")]) == 0
