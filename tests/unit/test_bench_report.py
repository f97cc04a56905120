"""Intervals, promises and reports say what the samples say, losses first."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_kit import CELL, record_of, sample

from memos_vllm.bench.intervals import median_interval, round_ratios
from memos_vllm.bench.promises import Outcome, findings, losses
from memos_vllm.bench.record import (
    Footprint,
    Pair,
    Record,
    RecordUnreadable,
    Verdict,
    read_record,
    write_record,
)
from memos_vllm.bench.report import markdown, write_report

ROUNDS = 11
STEADY = [0.100 + 0.001 * (number % 3) for number in range(ROUNDS)]


def times(**factors: float) -> Record:
    """Each situation some times as slow as 0.1 s, with a little noise."""
    return record_of(
        {name.replace("_", "-"): [f * s for s in STEADY] for name, f in factors.items()}
    )


def test_an_interval_holds_its_median_and_is_the_same_every_time() -> None:
    found = median_interval(STEADY)
    assert found.low <= found.median <= found.high
    assert (found.median, found.count) == (pytest.approx(0.101), ROUNDS)
    assert found == median_interval(STEADY)


def test_an_interval_covers_the_true_median_about_nineteen_times_in_twenty() -> None:
    import numpy as np

    drawn = np.random.default_rng(4)
    covered = 0
    for number in range(300):
        found = median_interval(list(drawn.normal(1.0, 0.1, size=15)), seed=number)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_ratios_are_taken_within_a_round_so_that_a_slow_minute_cancels() -> None:
    slow = [seconds * (10 if number > 5 else 1) for number, seconds in enumerate(STEADY)]
    record = record_of({"memos-resident": slow, "apc-warm": [2 * s for s in slow]})
    ratios = round_ratios(record.samples, CELL, "memos-resident", "apc-warm")
    assert ratios == pytest.approx([0.5] * ROUNDS)


def test_a_round_without_both_samples_gives_no_ratio() -> None:
    record = record_of({"memos-resident": STEADY, "apc-warm": STEADY[:4]})
    record.samples.append(sample("apc-warm", 7, 0.0, fault="HTTP 500"))
    assert len(round_ratios(record.samples, CELL, "memos-resident", "apc-warm")) == 4


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, Outcome.KEPT), (1.4, Outcome.BROKEN)])
def test_a_promise_is_held_against_the_interval(factor: float, outcome: Outcome) -> None:
    (found,) = findings(times(memos_resident=factor, apc_warm=1.0))
    assert (found.outcome, found.promise.base) == (outcome, "apc-warm")


def test_what_noise_leaves_open_is_neither_kept_nor_broken() -> None:
    spread = [0.101 if number % 2 else 0.120 for number in range(ROUNDS)]
    record = record_of({"memos-resident": spread, "apc-warm": [0.101] * ROUNDS})
    (found,) = findings(record)
    assert found.outcome is Outcome.OPEN


def test_a_few_rounds_neither_keep_nor_break_a_promise() -> None:
    record = record_of({"memos-resident": [0.3] * 4, "apc-warm": [0.1] * 4})
    (found,) = findings(record)
    assert found.outcome is Outcome.OPEN
    assert list(losses(record)) == []


def test_the_first_lines_say_where_memory_loses() -> None:
    report = markdown([times(memos_store=1.8, lmcache=1.0, apc_warm=1.0, direct=9.0)])
    loss = report.index("`memos-store` against `lmcache`")
    assert loss < report.index("A query of 32 tokens")
    assert "against `direct`" not in report
    assert len(list(losses(times(memos_store=0.9, lmcache=1.0)))) == 0
    assert "Nowhere in this run" in markdown([times(memos_store=0.9, lmcache=1.0)])


def test_a_row_with_a_fault_is_printed_as_failed_without_a_time() -> None:
    record = times(memos_store=0.5, apc_warm=1.0)
    record.samples.append(
        sample("memos-store", ROUNDS, 0.05, fault="the connector says 'computed', not 'store'")
    )
    report = markdown([record])
    (row,) = [line for line in report.splitlines() if "| 3,072 | memos-store |" in line]
    assert "failed: 1 of 12 samples: the connector says 'computed'" in row
    assert "(50" not in row
    assert "`memos-store` at 3,072 + 32 tokens failed" in report.partition("A query")[0]


def test_a_row_whose_answers_are_wrong_is_printed_as_failed_without_a_time() -> None:
    record = times(memos_int8=0.5, apc_warm=1.0)
    record.verdicts.append(Verdict("memos-int8", 3072, 6, 3, 2.5, 2.5, "1 of 36", "gap of 2.5"))
    (row,) = [line for line in markdown([record]).splitlines() if "| 3,072 | memos-int8 |" in line]
    assert "failed: wrong answers: gap of 2.5" in row


def test_an_interrupted_run_says_so() -> None:
    record = times(direct=1.0)
    record.complete = False
    assert "Interrupted" in markdown([record])


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = times(direct=1.0, memos_resident=0.1)
    record.pairs.append(Pair("plain chat", "plain vLLM", "s", 0.1, 0.1))
    record.footprints.append(Footprint("memos", 3, 2, 1))
    record.skipped["lmcache"] = "no wheel"
    write_record(record, tmp_path / "run.json")
    assert read_record(tmp_path / "run.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "no record of"),
        (b"not json", "no record of"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_record_is_refused_in_words(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordUnreadable, match=said):
        read_record(path)


def test_a_record_of_a_later_format_is_refused(tmp_path: Path) -> None:
    record = times(direct=1.0)
    record.format = 2
    write_record(record, tmp_path / "run.json")
    with pytest.raises(RecordUnreadable, match="update memos-vllm"):
        read_record(tmp_path / "run.json")


def test_a_report_has_plots_and_is_the_same_for_the_same_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = times(direct=10.0, apc_warm=1.0, memos_resident=1.0, memos_store=1.5)
    written = write_report([record], tmp_path / "a")
    again = write_report([record], tmp_path / "b")
    assert [path.name for path in written] == [
        "report.md",
        "ttft-by-memory-1.svg",
        "speed-up-1.svg",
    ]
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "](speed-up-1.svg)" in written[0].read_text()


def test_what_memory_costs_others_is_a_loss_too() -> None:
    record = times(memos_resident=1.0, apc_warm=1.0)
    chat, save = "plain chat with the plugin", "another stream beside a save"
    for seconds in STEADY:
        record.pairs.append(Pair(chat, "plain vLLM", "s", 1.2 * seconds, seconds))
        record.pairs.append(Pair(save, "beside none", "/s", 9 * seconds, 10 * seconds))
        record.pairs.append(Pair("each token", "plain vLLM", "s", seconds, seconds))
    record.pairs.append(Pair("wait, p99", "promised", "s", 0.050, 0.025))
    record.pairs.append(Pair("preemptions", "plain vLLM", "", 2, 0))
    first = markdown([record]).partition("A query")[0]
    assert f"{chat}: 1.2" in first
    assert f"{save}: 0.9" in first
    assert "wait, p99: 2" in first
    assert "preemptions: 2 instead of none of plain vLLM" in first
    assert "each token" not in first


def test_losses_under_load_and_through_floods_are_in_the_first_lines() -> None:
    record = times(memos_resident=1.0, apc_warm=1.0)
    run = {"concurrency": 4, "goodput_per_second": 1.0}
    record.load += [{**run, "situation": "memos"}]
    record.load += [{**run, "situation": "apc", "goodput_per_second": 1.5}]
    flood = {"samples": [], "pools_flooded": 22.0, "growth": 0.2, "last_to_first": 1.2}
    record.steady.append(
        {**flood, "situation": "memos-flooded", "growth_interval": (0.1, 0.3), "sources": {}}
    )
    first = markdown([record]).partition("A query")[0]
    assert "goodput, 4 at once: 1.0 a second, `apc` 1.5" in first
    assert "`memos-flooded` through floods: TTFT grows by 10.0% to 30.0%" in first


def test_a_run_that_compares_too_little_claims_nothing() -> None:
    report = markdown([record_of({"memos-resident": [0.1] * 3, "apc-warm": [0.1] * 3})])
    assert "Too little was compared to say." in report


def test_a_rival_with_wrong_answers_is_nothing_to_be_compared_with() -> None:
    record = times(memos_store=1.8, lmcache=1.0)
    record.verdicts.append(Verdict("lmcache", 3072, 6, 3, 2.5, 2.5, "1 of 36", "gap of 2.5"))
    first = markdown([record]).partition("A query")[0]
    assert "against `lmcache`" not in first
    assert "`lmcache` at 3,072 + 32 tokens failed" in first
