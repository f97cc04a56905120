"""Fails when memory has become slower beside plain vLLM than it was: `python -m benchmarks.gate`.

Only ratios of samples from the same rounds are compared: a slow machine slows both alike. A ratio
has worsened when its whole interval lies above that of the baseline; before it is said to have,
more rounds are measured. `--update` widens the baseline by what this run measured, and starts it
anew on a kind of machine that it has none for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memos_vllm.bench.intervals import median_interval, round_ratios
from memos_vllm.bench.machine import default_block_tokens, expected_prefill_tokens_a_second
from memos_vllm.bench.measurement import Settings
from memos_vllm.bench.plan import make_plan
from memos_vllm.bench.record import Record, read_record
from memos_vllm.bench.ttft import max_model_len, run
from memos_vllm.models.prepare import prepare

BASELINE = Path(__file__).parent / "gate.json"
# (row, beside what): enough to notice a change in the engine, the pool or the store.
PAIRS = (
    ("memos-resident", "apc-warm"),
    ("memos-resident", "direct"),
    ("memos-store", "apc-warm"),
    ("memos-flooded", "apc-warm"),
)
_TRIES = 2
_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of a ratio, and between what it lies (95 %)."""

    median: float
    low: float
    high: float
    rounds: int

    def joined(self, other: Ratio) -> Ratio:
        """Wide enough for both runs."""
        return Ratio(
            (self.median + other.median) / 2,
            min(self.low, other.low),
            max(self.high, other.high),
            self.rounds + other.rounds,
        )


def machine_kind(record: Record) -> str:
    """Ratios are comparable between machines of one kind."""
    machine = record.machine
    return " / ".join([machine["cpu"], f"{machine['cores']} cores", *machine["flags"]])


def ratios_of(records: Sequence[Record]) -> dict[str, Ratio]:
    """Name of a pair and cell -> its ratio over all rounds of these runs."""
    found = {}
    for cell in sorted({sample.cell for record in records for sample in record.samples}):
        for row, base in PAIRS:
            ratios = [
                ratio
                for record in records
                for ratio in round_ratios(record.samples, cell, row, base)
            ]
            if ratios:
                one = median_interval(ratios)
                name = f"{row} / {base}, {cell}"
                found[name] = Ratio(one.median, one.low, one.high, one.count)
    return found


def worsened(now: Mapping[str, Ratio], baseline: Mapping[str, Ratio]) -> list[str]:
    """The pairs whose interval lies above the baseline's, or that were not measured, in words."""
    lacking = [
        f"{name}: not measured, but in the baseline" for name in baseline.keys() - now.keys()
    ]
    return sorted(lacking) + [
        f"{name}: {now[name].median:.3g} ({now[name].low:.3g}-{now[name].high:.3g}), the baseline "
        f"is {before.median:.3g} ({before.low:.3g}-{before.high:.3g})"
        for name, before in baseline.items()
        if name in now and now[name].low > before.high
    ]


def faults_of(records: Sequence[Record]) -> list[str]:
    """Samples that did not show what they claim."""
    return [
        f"{sample.situation}, {sample.cell}: {sample.fault}"
        for record in records
        for sample in record.samples
        if sample.fault
    ]


def read_baseline(path: Path, kind: str) -> dict[str, Ratio]:
    """The baseline of a kind of machine; empty when there is none."""
    if not path.exists():
        return {}
    known: dict[str, Any] = json.loads(path.read_text())
    return {name: Ratio(**value) for name, value in known.get(kind, {}).items()}


def write_baseline(path: Path, kind: str, ratios: Mapping[str, Ratio]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    known[kind] = {name: asdict(ratio) for name, ratio in ratios.items()}
    path.write_text(f"{json.dumps(known, indent=2, sort_keys=True)}\n")


def measure(folder: Path, number: int) -> Record:
    """One quick run with the rows of the pairs only."""
    model = prepare(_MODEL, progress=_note)
    plan = make_plan(
        quick=True,
        max_model_len=max_model_len(model),
        block_tokens=default_block_tokens(),
        situations=sorted({name for pair in PAIRS for name in pair}),
        probes=False,
        expected_prefill=expected_prefill_tokens_a_second(model),
    )
    settings = Settings(
        model=model, output=folder / f"run-{number}.json", seed=secrets.randbits(32)
    )
    return run(plan, settings, note=_note, report=lambda _share, _message: None)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument(
        "--record", type=Path, nargs="+", help="judge these runs instead of measuring"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the samples there")
    parser.add_argument("--update", action="store_true", help="widen the baseline by this run")
    options = parser.parse_args(argv)
    if options.record:
        return _judge([read_record(path) for path in options.record], options)
    with contextlib.ExitStack() as last:
        folder = options.keep or Path(
            last.enter_context(tempfile.TemporaryDirectory(prefix="memos-gate-"))
        )
        records: list[Record] = []
        for number in range(_TRIES):
            if number:
                _note("gate: measuring again, to tell a change from noise")
            # What a run with a fault says of ratios does not count.
            records = [one for one in records if not faults_of([one])]
            records.append(measure(folder, number))
            if _judge(records, options) == 0:
                return 0
    return 1


def _judge(records: Sequence[Record], options: argparse.Namespace) -> int:
    kind = machine_kind(records[0])
    baseline, now = read_baseline(options.baseline, kind), ratios_of(records)
    if faults := faults_of(records):
        print("\n".join(f"gate: {fault}" for fault in faults))
        return 1
    for name, ratio in now.items():
        print(f"gate: {name}: {ratio.median:.3g} ({ratio.low:.3g}-{ratio.high:.3g})")
    if options.update:
        joined = {n: baseline[n].joined(r) if n in baseline else r for n, r in now.items()}
        write_baseline(options.baseline, kind, joined)
        return 0
    if not baseline:
        print(f"gate: no baseline for {kind}; make one with --update")
        return 0
    found = worsened(now, baseline)
    print("\n".join(f"gate: worse: {one}" for one in found) or "gate: nothing is worse")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
