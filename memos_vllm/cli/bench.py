"""`memos-vllm bench ...`: measure what memory saves on this machine."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from memos_vllm.cli import bench_simulate, output
from memos_vllm.cli.options import AsJson

_SERVER_OPTIONS = "memos_vllm.server_options"

app = typer.Typer(
    help="Measure time to first token with memory, beside what you would use instead.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def bench() -> None:
    """Measure time to first token with memory, beside what you would use instead."""


class _WithServerOptions(TyperCommand):
    """A command whose arguments after `--` are for the servers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        mark = args.index("--") if "--" in args else len(args)
        ctx.meta[_SERVER_OPTIONS] = args[mark + 1 :]
        return super().parse_args(ctx, args[:mark])


@app.command(cls=_WithServerOptions)
def ttft(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id org/name.")
    ] = "smollm2-135m-instruct",
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The grid that takes minutes.")] = False,
    target: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Every raw sample, as JSON.")
    ] = Path("ttft.json"),
    rounds: Annotated[int, typer.Option(help="Samples of each row.")] = 9,
    memory: Annotated[
        list[int] | None,
        typer.Option(help="Length of memory in tokens; repeatable.", show_default=False),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="short, medium or long; repeatable.", show_default=False),
    ] = None,
    situation: Annotated[
        list[str] | None,
        typer.Option(help="A row, as memos-resident; repeatable.", show_default=False),
    ] = None,
    probes: Annotated[bool, typer.Option(help="Compare answers with plain vLLM's as well.")] = True,
    costs: Annotated[
        bool | None,
        typer.Option(
            help="Measure plain chats beside the plugin and beside saves; not with --quick.",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        bool | None,
        typer.Option(
            help="Measure many chats at once, and 200 through floods; not with --quick.",
            show_default=False,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer; the model's.", show_default=False),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a KV block; vLLM's default.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides texts and order.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and how long it takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure time to first token on real servers; what follows `--` goes to each of them."""
    from memos_vllm.bench import plan as planning
    from memos_vllm.bench import ttft as measuring
    from memos_vllm.bench.machine import (
        default_block_tokens,
        expected_prefill_tokens_a_second,
    )
    from memos_vllm.bench.measurement import Settings
    from memos_vllm.bench.progress import minutes
    from memos_vllm.bench.report import markdown
    from memos_vllm.models.prepare import prepare

    say = output.note
    folder = prepare(model, progress=say)
    blocks = block_tokens or default_block_tokens()
    plan = planning.make_plan(
        quick=quick,
        max_model_len=max_model_len or measuring.max_model_len(folder),
        block_tokens=blocks,
        memory=memory or (),
        queries=query or (),
        situations=situation or (),
        rounds=rounds,
        probes=probes,
        costs=costs,
        load=load,
        expected_prefill=expected_prefill_tokens_a_second(folder),
    )
    say(
        f"{len(plan.cells)} cells x {len(plan.situations)} situations x {plan.rounds} rounds on "
        f"{len(plan.servers)} servers, about {minutes(plan.seconds())}"
    )
    if quick and not memory:
        fits = plan.seconds() <= planning.QUICK_SECONDS
        why = (
            f"the longest with which this machine should end within {planning.QUICK_SECONDS:.0f} s"
            if fits
            else "the shortest there is, as this machine is slow"
        )
        say(f"a memory of {plan.memory_tokens[0]:,} tokens: {why}; --memory names others")
    if plan.rounds < planning.MIN_ROUNDS:
        say(f"fewer than {planning.MIN_ROUNDS} rounds: the intervals will say little")
    if dry_run:
        return
    settings = Settings(
        model=folder,
        output=target,
        seed=secrets.randbits(32) if seed is None else seed,
        server_options=["--block-size", str(blocks), *context.meta[_SERVER_OPTIONS]],
    )
    with output.progress("measuring") as report:
        record = measuring.run(plan, settings, note=say, report=report)
    if as_json:
        output.say(target.read_text())
    else:
        output.say(markdown([record]))
        output.note(f"every sample is in {target}; `memos-vllm bench report {target}` draws it")


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(metavar="FILE...", help="From `bench ttft`.")],
    *,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Write report.md and plots there, instead of printing the tables.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn one or more records into Markdown tables and plots."""
    from memos_vllm.bench.record import read_record
    from memos_vllm.bench.report import markdown, write_report

    read = [read_record(path) for path in records]
    if target is None:
        output.say(markdown(read))
        return
    for path in write_report(read, target):
        output.say(str(path))


app.command()(bench_simulate.simulate)
