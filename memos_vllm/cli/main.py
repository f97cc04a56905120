"""The entry point `memos-vllm`: 0 done, 1 failed, 2 misuse, 130 interrupted."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memos_vllm import __version__
from memos_vllm.cli import (
    audit,
    bench,
    chat,
    cube,
    doctor,
    jobs,
    keys,
    memory,
    models,
    output,
    passthrough,
    sharing,
)
from memos_vllm.errors import MemosError


class ReportingGroup(TyperGroup):
    """Turns what goes wrong in any command into one sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # A pipe that is closed shows here, and not in the interpreter's last moments.
            sys.stdout.flush()
        except MemosError as error:
            output.note(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            output.note("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            _close_stdout()
            raise typer.Exit(1) from None
        except OSError as error:
            # A full disk, a file that may not be read: the system's own sentence says it.
            output.note(f"error: {error}")
            raise typer.Exit(1) from None
        return result


app = typer.Typer(
    name="memos-vllm",
    cls=ReportingGroup,
    help="Memory for LLM serving: MemCubes whose KV is already in attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=passthrough.PassThrough)(passthrough.serve)
app.command(cls=passthrough.PassThrough)(passthrough.demo)
app.command()(chat.chat)
app.command()(doctor.doctor)
for command in (sharing.share, sharing.unshare, sharing.grants):
    cube.app.command()(command)
app.add_typer(cube.app, name="cube")
app.add_typer(memory.app, name="memory")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"memos-vllm {__version__}")
        raise typer.Exit()


@app.callback()
def memos_vllm(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Memory for LLM serving: MemCubes whose KV is already in attention."""


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # In a locale without UTF-8 a character is spelled out rather than a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="memos-vllm")


def _close_stdout() -> None:
    """Let the interpreter's last flush go nowhere, or it would complain about the pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


if __name__ == "__main__":
    main()
