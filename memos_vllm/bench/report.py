"""Records as Markdown: first where memory loses, then every row, then what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from memos_vllm.bench.intervals import Interval, median_interval, of_cell, round_ratios
from memos_vllm.bench.promises import FEWEST_ROUNDS, Outcome, findings, losses
from memos_vllm.bench.record import Cell, Pair, Record, Sample
from memos_vllm.bench.situations import BY_NAME, SITUATIONS
from memos_vllm.errors import ConfigurationError

_BASES = ("direct", "apc-warm")


def markdown(records: Sequence[Record]) -> str:
    """One or more runs as tables, each with its machine."""
    return "\n\n".join(_record(record) for record in records)


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write report.md and its plots.

    Returns:
        The files. Plots need matplotlib (`pip install 'memos-vllm[bench]'`).
    Raises:
        ConfigurationError: it is not installed, or the folder cannot be written.
    """
    from memos_vllm.bench.plots import draw

    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [
            path for number, one in enumerate(records, 1) for path in draw(one, folder, number)
        ]
        report = folder / "report.md"
        pictures = "\n\n".join(f"![{path.stem.replace('-', ' ')}]({path.name})" for path in drawn)
        report.write_text(f"{markdown(records)}\n\n{pictures}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the report cannot be written: {error}") from error
    return [report, *drawn]


def _record(record: Record) -> str:
    parts = [
        _title(record),
        _list("Where memory loses", _lost(record), none=_nothing_lost(record)),
        _promises(record),
        *(_grid(record, query) for query in sorted({s.cell.query_tokens for s in record.samples})),
        _list("Not measured", [f"{name}: {why}" for name, why in record.skipped.items()]),
        _builds(record),
        _verdicts(record),
        _pairs(record.pairs),
        _load(record),
        _footprints(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _title(record: Record) -> str:
    machine, settings = record.machine, record.settings
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    state = "" if record.complete else " **Interrupted: what is below is not all.**"
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    flags = f" ({', '.join(machine['flags'])})" if machine["flags"] else ""
    return (
        f"## Time to first token, {settings['model']}, {record.started_at[:10]}\n\n"
        f"{where}{flags}, Python {machine['python']}, {packages}, memos-vllm "
        f"{machine['memos-vllm']} ({machine['commit'] or 'no checkout'}). "
        f"{settings['rounds']} rounds in random order, a pool of {settings['pool_blocks']} blocks "
        f"of {settings['block_tokens']} tokens, seed {settings['seed']}, "
        f"{record.seconds / 60:.1f} minutes.{state}"
    )


def _nothing_lost(record: Record) -> str:
    if all(found.outcome is Outcome.OPEN for found in findings(record)):
        return "Too little was compared to say."
    return "Nowhere in this run, beyond noise."


def _lost(record: Record) -> list[str]:
    lines = [
        f"`{name}` against `{rival}` at {cell} tokens: {_ratio(found)} times its time"
        for cell, name, rival, found in losses(record)
        if not row_fault(record, cell, rival)
    ]
    lines += [f"{name}: {ratio} of {base}" for name, base, ratio in _costly(record.pairs)]
    lines += _lost_under_load(record)
    for cell, situation, reason in _failed(record):
        lines.append(f"`{situation}` at {cell} tokens failed: {reason}")
    return lines


def _costly(pairs: Iterable[Pair]) -> Iterator[tuple[str, str, str]]:
    """What memory makes worse for others beyond noise: what, beside what, by how much."""
    for (name, base, unit), found in _grouped(pairs).items():
        ratios = [pair.value / pair.base_value for pair in found if pair.base_value]
        # Of speeds the lower is the worse; a single number is a count, or one that was promised.
        if len(ratios) >= FEWEST_ROUNDS or (len(found) == 1 and ratios):
            ratio = median_interval(ratios)
            if ratio.high < 1 if unit.startswith("/") else ratio.low > 1:
                yield name, base, _ratio(ratio)
        elif len(found) == 1 and found[0].value > 0:
            yield name, base, f"{found[0].value:.4g} instead of none"


def _lost_under_load(record: Record) -> Iterator[str]:
    goodput = {(run["situation"], run["concurrency"]): run for run in record.load}
    for (situation, concurrency), run in goodput.items():
        other = goodput.get(("apc", concurrency))
        if situation == "memos" and other is not None:
            ours, theirs = run["goodput_per_second"], other["goodput_per_second"]
            if ours < theirs:
                yield f"goodput, {concurrency} at once: {ours} a second, `apc` {theirs}"
    for run in record.steady:
        if run["situation"].startswith("memos-") and run["growth_interval"][0] > 0:
            low, high = run["growth_interval"]
            yield f"`{run['situation']}` through floods: TTFT grows by {low:.1%} to {high:.1%}"


def _failed(record: Record) -> Iterator[tuple[Cell, str, str]]:
    """Rows that do not count, and why: a sample's own fault, or its answers'."""
    for cell in sorted({sample.cell for sample in record.samples}):
        for situation in SITUATIONS:
            if reason := row_fault(record, cell, situation.name):
                yield cell, situation.name, reason


def row_fault(record: Record, cell: Cell, situation: str) -> str:
    """Why a row is printed without a time; "" when it counts."""
    samples = [s for s in record.samples if s.cell == cell and s.situation == situation]
    faults = [sample.fault for sample in samples if sample.fault]
    if faults:
        return f"{len(faults)} of {len(samples)} samples: {faults[0]}"
    for verdict in record.verdicts:
        same = verdict.situation == situation and verdict.memory_tokens == cell.memory_tokens
        if same and verdict.fault:
            return f"wrong answers: {verdict.fault}"
    return ""


def _promises(record: Record) -> str:
    rows = [
        (
            f"`{found.promise.situation}` / `{found.promise.base}`",
            found.cell,
            f"≤ {found.promise.limit:.3g}",
            _ratio(found.ratio),
            found.outcome if found.outcome is not Outcome.BROKEN else f"**{found.outcome}**",
        )
        for found in findings(record)
        if not row_fault(record, found.cell, found.promise.situation)
        and not row_fault(record, found.cell, found.promise.base)
    ]
    return _table("Promised", ("ratio", "tokens", "promised", "measured (95 %)", ""), rows)


def _grid(record: Record, query_tokens: int) -> str:
    cells = sorted({s.cell for s in record.samples if s.cell.query_tokens == query_tokens})
    rows: list[tuple[object, ...]] = []
    for cell in cells:
        for situation in SITUATIONS:
            samples = list(of_cell(record.samples, cell, situation.name).values())
            if fault := row_fault(record, cell, situation.name):
                rows.append(
                    (f"{cell.memory_tokens:,}", situation.name, f"failed: {fault}", "", "", "", "")
                )
            elif samples:
                rows.append(_row(record, cell, situation.name, samples))
    heads = ("memory", "situation", "TTFT ms (95 %)", *(f"× {base}" for base in _BASES))
    return _table(
        f"A query of {query_tokens} tokens",
        (*heads, "tokens cached", "n"),
        rows,
        legend=_legend(rows),
    )


def _row(record: Record, cell: Cell, name: str, samples: Sequence[Sample]) -> tuple[object, ...]:
    seconds = median_interval([sample.ttft_seconds for sample in samples])
    ratios = []
    for base in _BASES:
        found = round_ratios(record.samples, cell, name, base)
        compared = found and base != name and not row_fault(record, samples[0].cell, base)
        ratios.append(_ratio(median_interval(found)) if compared else "")
    cached = statistics.median(sample.cached_tokens for sample in samples)
    return (
        f"{cell.memory_tokens:,}",
        name,
        f"{seconds.median * 1e3:.0f} ({seconds.low * 1e3:.0f}–{seconds.high * 1e3:.0f})",
        *ratios,
        f"{cached:,.0f}",
        len(samples),
    )


def _legend(rows: Sequence[Sequence[object]]) -> str:
    names = dict.fromkeys(str(row[1]) for row in rows)
    return "; ".join(f"`{name}`: {BY_NAME[name].state.value}" for name in names)


def _builds(record: Record) -> str:
    rows = [
        (b.server, f"{b.memory_tokens:,}", f"{b.seconds:.2f}", f"{b.size_bytes / 1e6:.1f}")
        for b in record.builds
    ]
    return _table("Baking", ("server", "memory tokens", "s", "MB on disk"), rows)


def _verdicts(record: Record) -> str:
    rows = [
        (
            v.situation,
            f"{v.memory_tokens:,}",
            f"{v.differing} of {v.prompts}",
            f"{v.gap:.3g}",
            f"{v.shift:.3g}",
            v.fault or BY_NAME[v.situation].answers.value,
        )
        for v in record.verdicts
    ]
    heads = ("situation", "memory", "answers that differ", "gap, nats", "largest shift", "")
    noise = next((f"Plain vLLM against itself: {v.noise}." for v in record.verdicts), "")
    return _table("Answers beside plain vLLM's", heads, rows, legend=noise)


def _grouped(pairs: Iterable[Pair]) -> dict[tuple[str, str, str], list[Pair]]:
    grouped: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.name, pair.base, pair.unit), []).append(pair)
    return grouped


def _pairs(pairs: Iterable[Pair]) -> str:
    rows = []
    for (name, base, unit), found in _grouped(pairs).items():
        value = statistics.median(pair.value for pair in found)
        other = statistics.median(pair.base_value for pair in found)
        ratios = [pair.value / pair.base_value for pair in found if pair.base_value]
        rows.append(
            (
                name,
                f"{value:.4g} {unit}",
                base,
                f"{other:.4g} {unit}",
                _ratio(median_interval(ratios)) if ratios else "",
                _difference(found) if unit == "s" and len(found) > 1 else "",
                len(found),
            )
        )
    heads = ("", "", "beside", "", "ratio (95 %)", "difference ms, p50 / p99", "n")
    return _table("What memory costs others", heads, rows)


def _difference(pairs: Sequence[Pair]) -> str:
    p50, p99 = np.percentile([(p.value - p.base_value) * 1e3 for p in pairs], [50, 99])
    return f"{p50:.1f} / {p99:.1f}"


def _load(record: Record) -> str:
    rows = [tuple(run.get(key, "") for key in _LOAD_HEADS) for run in record.load]
    table = _table("Under load", _LOAD_HEADS, rows)
    steady = [
        (
            run["situation"],
            len(run["samples"]),
            f"{run['pools_flooded']:.0f}",
            f"{run['growth']:+.1%} ({run['growth_interval'][0]:+.1%} to "
            f"{run['growth_interval'][1]:+.1%})",
            f"{run['last_to_first']:.2f}",
            ", ".join(f"{name} {count}" for name, count in run["sources"].items()),
        )
        for run in record.steady
    ]
    heads = ("situation", "chats", "pools flooded", "TTFT grows", "last / first quarter", "source")
    return f"{table}\n\n{_table('Through floods', heads, steady)}".strip()


_LOAD_HEADS = (
    *("situation", "concurrency", "request_rate", "requests", "goodput_per_second"),
    *("ttft_p50_ms", "ttft_p99_ms", "output_tokens_per_second", "tokens_per_second_a_chat"),
    "errors",
)


def _footprints(record: Record) -> str:
    rows = [
        (
            f.server,
            f"{f.peak_bytes / 2**20:,.0f}",
            f"{f.proportional_bytes / 2**20:,.0f}",
            f"{f.pool_bytes / 2**20:,.0f}",
        )
        for f in record.footprints
    ]
    heads = ("server", "peak of its processes", "at the end, shared counted once", "KV pool")
    return _table("Memory, MiB", heads, rows)


def _ratio(found: Interval) -> str:
    return f"{found.median:.3g} ({found.low:.3g}–{found.high:.3g})"


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    legend: str = "",
) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join([f"### {title}", "", *lines, *(["", legend] if legend else [])])


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _list(title: str, items: Sequence[str], *, none: str = "") -> str:
    if not items and not none:
        return ""
    lines = [f"- {_cell(item)}" for item in items] or [none]
    return "\n".join([f"### {title}", "", *lines])
