"""`memos-vllm bench simulate`: which hit rate and TTFT to expect with X GB of each tier."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import AsJson

if TYPE_CHECKING:
    from memos_vllm.bench.simulation import Machine, Outcome, Workload

Value = TypeVar("Value")

_UNITS: dict[str, int] = {
    "": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t", "p"))},
    **{f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)")


def simulate(
    *,
    preset: Annotated[
        str, typer.Option(help="The machine: this-machine (measured) or h100 (assumed).")
    ] = "this-machine",
    cubes: Annotated[int, typer.Option(min=1, help="Cubes that are chatted with.")] = 100_000,
    requests: Annotated[int, typer.Option(min=1, help="Chats with memory.")] = 200_000,
    zipf: Annotated[
        float, typer.Option(min=0.0, help="Exponent of the cubes' popularity; 0 is uniform.")
    ] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Chats a second; the preset's when absent.", show_default=False),
    ] = None,
    median_tokens: Annotated[
        int, typer.Option(min=1, help="Median size of the memories, which are log-normal.")
    ] = 2048,
    plain_tokens: Annotated[
        int, typer.Option(min=0, help="Mean tokens of plain prompts between two chats.")
    ] = 2048,
    drift: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.0, help="How often a tenth of the popularity moves; 0: never."
        ),
    ] = 0.0,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE",
            help="Size of a tier, as pool=8GiB; may be repeated.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE,SIZE...",
            help="Sizes of a tier to try one after another; of several tiers, all combinations.",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=NUMBER",
            help="Another number of the preset, as prefill_tokens_per_second=20000 or "
            "nvme.read_bytes_per_second=3e9; may be repeated.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="ours, lru, arc or nothing; may be repeated; all when absent.",
            show_default=False,
        ),
    ] = None,
    residency_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the pool that our policy keeps; the server's default when absent.",
            show_default=False,
        ),
    ] = None,
    warm_up: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the chats that is not counted.")
    ] = 0.0,
    recompute_when_faster: Annotated[
        bool,
        typer.Option(
            "--recompute-when-faster",
            help="Compute where loading takes longer. The server never does.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same result.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Replay a drawn trace of chats: what each policy and tier saves, and the TTFT to expect."""
    from memos_vllm.bench.simulation import POLICIES, Workload, create_policy, draw
    from memos_vllm.bench.simulation import sweep as run_sweep
    from memos_vllm.bench.simulation.policies import Tuning

    machine = _machine(preset, tier or [], setting or [])
    sizes = dict(_assignment(text, _sizes) for text in sweep or [])
    tuning = Tuning(residency_fraction=residency_fraction)
    policies = [create_policy(name, tuning) for name in dict.fromkeys(policy or POLICIES)]
    workload = Workload(
        cubes=cubes,
        requests=requests,
        zipf=zipf,
        requests_per_second=machine.requests_per_second if rate is None else rate,
        median_tokens=median_tokens,
        plain_tokens=plain_tokens,
        drift_seconds=drift,
        seed=seed,
    )
    with output.progress("simulating", silent=as_json) as report:
        outcomes = list(
            run_sweep(
                draw(workload),
                machine,
                policies,
                sizes=sizes,
                warm_up=warm_up,
                recompute_when_faster=recompute_when_faster,
                # In steps, since what is not a terminal gets a line for each.
                on_progress=lambda share, run: report(int(20 * share) / 20, run),
            )
        )
    if as_json:
        _say_json(machine, workload, outcomes)
    else:
        _say_outcomes(machine, outcomes, swept=sizes)


def parse_size(text: str) -> int:
    """Bytes of `8GiB`, `40 GB` or `4096`.

    Raises:
        typer.BadParameter.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise typer.BadParameter(f"'{text}' is no size; write it as 8GiB, 40GB or 4096")
    return round(float(match[1]) * unit)


def _machine(preset: str, tiers: Iterable[str], settings: Iterable[str]) -> Machine:
    from memos_vllm.bench.simulation import MACHINES

    if preset not in MACHINES:
        raise typer.BadParameter(f"there is no preset '{preset}'; there are {', '.join(MACHINES)}")
    machine = MACHINES[preset]
    for text in tiers:
        machine = machine.with_size(*_assignment(text, parse_size))
    for text in settings:
        machine = machine.with_setting(*_assignment(text, _number))
    return machine


def _assignment(text: str, parse: Callable[[str], Value]) -> tuple[str, Value]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"'{text}' is not of the form NAME=VALUE")
    return name.strip(), parse(value)


def _sizes(text: str) -> list[int]:
    return [parse_size(size) for size in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number") from None


def _say_json(machine: Machine, workload: Workload, outcomes: list[Outcome]) -> None:
    output.say_json(
        {
            "machine": dataclasses.asdict(machine),
            "workload": dataclasses.asdict(workload),
            "results": [outcome.as_json() for outcome in outcomes],
        }
    )


def _say_outcomes(machine: Machine, outcomes: list[Outcome], *, swept: Iterable[str]) -> None:
    shown = list(swept)
    heads = (
        *(f"{name} size" for name in shown),
        "policy",
        *(f"{tier.name} hits" for tier in machine.tiers),
        "computed",
        "prefill saved",
        "TTFT p50",
        "p99",
        "p99 queued",
        "TTFT grows",
        "engine busy",
    )
    output.say_table(heads, [_row(outcome, shown) for outcome in outcomes])
    output.say_dim(f"{machine.name}: {machine.origin}")


def _row(outcome: Outcome, shown: list[str]) -> list[str]:
    capacity = {tier.name: tier.capacity_bytes for tier in outcome.tiers}
    queued, growth = outcome.ttft_queued, outcome.ttft_growth
    saved = outcome.prefill_seconds_saved
    return [
        *(output.size(capacity[name]) for name in shown),
        outcome.policy,
        *(f"{tier.hit_rate:.1%}" for tier in outcome.tiers),
        f"{1 - outcome.hit_rate:.1%}",
        f"{saved:,.0f} s ({saved / outcome.prefill_seconds:.1%})",
        f"{outcome.ttft.p50:.3f} s",
        f"{outcome.ttft.p99:.3f} s",
        f"{queued.p99:.3f} s" if queued else "overloaded",
        f"{growth[0]:+.1%} to {growth[1]:+.1%}" if growth else "",
        f"{outcome.engine_busy:.0%}",
    ]
