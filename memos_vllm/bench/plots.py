"""Plots of a record: TTFT against memory length, what is saved, and time under flooding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memos_vllm.bench.intervals import median_interval, of_cell, round_ratios
from memos_vllm.bench.record import Cell, Record
from memos_vllm.bench.report import row_fault
from memos_vllm.bench.situations import SITUATIONS, Situation
from memos_vllm.errors import ConfigurationError

_COLOURS = {
    **{"no-memory": "#9aa0a6", "direct": "#b3261e", "apc-warm": "#f29900"},
    **{"apc-flooded": "#e8710a", "lmcache": "#7b1fa2", "example-connector": "#ad1457"},
    **{"memos-resident": "#0b57d0", "memos-flooded": "#4285f4", "memos-store": "#188038"},
    **{"memos-restart": "#34a853", "memos-restart-cold": "#81c995"},
    **{"memos-int8": "#12a4af", "memos-int4": "#78d9e0"},
}


def draw(record: Record, folder: Path, number: int) -> list[Path]:
    """Draw what the record has samples for, as SVG files.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    shortest = min((s.cell.query_tokens for s in record.samples), default=0)
    cells = sorted({s.cell for s in record.samples if s.cell.query_tokens == shortest})
    drawn = []
    for name, plot in (
        ("ttft-by-memory", _by_memory),
        ("speed-up", _speed_up),
        ("under-flooding", _timeline),
    ):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.5), layout="constrained")
        if plot(axes, record, cells):
            path = folder / f"{name}-{number}.svg"
            # The same record gives the same file.
            figure.savefig(path, metadata={"Date": None})
            drawn.append(path)
        pyplot.close(figure)
    return drawn


def _by_memory(axes: Any, record: Record, cells: list[Cell]) -> bool:
    """One line a situation, with the interval of each median."""
    for situation in _measured(record):
        points = []
        for cell in cells:
            samples = of_cell(record.samples, cell, situation.name)
            if samples and not row_fault(record, cell, situation.name):
                found = median_interval([s.ttft_seconds * 1e3 for s in samples.values()])
                points.append((cell.memory_tokens, found))
        if points:
            medians = [found.median for _, found in points]
            below = [found.median - found.low for _, found in points]
            above = [found.high - found.median for _, found in points]
            axes.errorbar(
                [tokens for tokens, _ in points],
                medians,
                yerr=[below, above],
                label=situation.name,
                color=_COLOURS[situation.name],
                marker="o",
                markersize=4,
                capsize=3,
            )
    axes.set_yscale("log")
    axes.set_xlabel("memory, tokens")
    axes.set_ylabel("time to first token, ms (median, 95 %)")
    axes.set_title(_title(record))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    return bool(cells)


def _speed_up(axes: Any, record: Record, cells: list[Cell]) -> bool:
    """How many times sooner than a full prefill, at the longest memory."""
    bars = []
    for situation in _measured(record):
        ratios = round_ratios(record.samples, cells[-1], situation.name, "direct") if cells else []
        if (
            ratios
            and situation.name != "direct"
            and not row_fault(record, cells[-1], situation.name)
        ):
            bars.append((situation.name, median_interval([1 / ratio for ratio in ratios])))
    for name, found in bars:
        error = [[found.median - found.low], [found.high - found.median]]
        axes.barh(name, found.median, xerr=error, color=_COLOURS[name], capsize=3)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#b3261e", linewidth=1)
    axes.set_xlabel("times sooner than a full prefill (median of rounds, 95 %)")
    axes.set_title(f"{_title(record)}, {cells[-1]} tokens" if cells else "")
    return bool(bars)


def _timeline(axes: Any, record: Record, _cells: list[Cell]) -> bool:
    """TTFT of chat after chat while other prompts keep cycling the pool."""
    for run in record.steady:
        times = [sample["ttft_seconds"] * 1e3 for sample in run["samples"]]
        axes.plot(times, ".-", label=run["situation"], color=_COLOURS.get(run["situation"]))
    axes.set_xlabel("chats, a flood of other prompts before each tenth")
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.set_title(_title(record))
    if record.steady:
        axes.legend(fontsize=8)
    return bool(record.steady)


def _measured(record: Record) -> Iterator[Situation]:
    names = {sample.situation for sample in record.samples}
    return (situation for situation in SITUATIONS if situation.name in names)


def _title(record: Record) -> str:
    where = record.machine.get("gpu") or f"{record.machine['cores']} CPU cores"
    return f"{record.settings['model']}, {where}"


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigurationError(
            "plots need matplotlib: pip install 'memos-vllm[bench]'"
        ) from error
    mpl.use("svg")
    # Ids in the file follow from this, not from chance.
    mpl.rcParams["svg.hashsalt"] = "memos-vllm"
    from matplotlib import pyplot

    return pyplot
