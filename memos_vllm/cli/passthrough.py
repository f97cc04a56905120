"""Commands whose arguments belong to another program and are handed on as they were typed."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

SERVE_USAGE = """\
Usage: memos-vllm serve MODEL [OPTIONS]

  Serve MODEL (smollm2-135m-instruct, a folder, or a hub id) with vLLM, and MemCubes
  beside it.

"""
SERVE_END = """
Each of these may also be set in the environment, as MEMOS_DATA_DIR.

Every option of `vllm serve` works as well and is handed on untouched, as --port,
--dtype or --max-model-len; `memos-vllm serve --help=all` lists them.
"""


class PassThrough(TyperCommand):
    """Leaves every argument in `context.args`, `--help` and `--` included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return args


def serve(context: typer.Context) -> None:
    """Serve a model with memory; every `vllm serve` option works."""
    arguments = list(context.args)
    if not arguments or {"--help", "-h"} & set(arguments):
        typer.echo(serve_help(), err=not arguments, nl=False)
        raise typer.Exit(0 if arguments else 2)
    from memos_vllm.engine.supervisor import main

    raise typer.Exit(main(arguments))


def demo(context: typer.Context) -> None:
    """Show memory at work on a real server."""
    from memos_vllm.demo.run import main

    raise typer.Exit(main(list(context.args)))


def serve_help() -> str:
    """The help of `serve`, from the parser that reads its options; imports no vLLM."""
    from memos_vllm.engine.serve import own_parser

    return f"{SERVE_USAGE}{own_parser().format_help()}{SERVE_END}"
