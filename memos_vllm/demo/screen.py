"""What the demo prints: steps with a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.status import Status
from rich.text import Text

from memos_vllm.cli.output import one_line, printable

# Away from a terminal: how long a step may be silent.
_QUIET_SECONDS = 10.0

Progress = Callable[[str], None]


class Screen:
    """Writes to stdout.

    Args:
        console: where to write; stdout when not given.
        clock: monotonic seconds.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._clock = clock
        self._steps = 0

    def step(self, title: str) -> None:
        """Begin the next numbered part."""
        self._steps += 1
        self.line()
        self._print(f"{self._steps}. {title}", style="bold")

    def line(self, text: str = "", *, style: str = "") -> None:
        """Print one line, indented under the step's title."""
        self._print(f"   {text}" if text else "", style=style)

    def answer(self, label: str, text: str, *, verdict: str, good: bool) -> None:
        """Print a model's answer as it came, on one line, and what to think of it."""
        self.line(f'{label:<18} "{one_line(text, limit=150)}"')
        self.line(f"{'':<18} {verdict}", style="green" if good else "yellow")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows of equally many cells in columns; the first row is the head."""
        for number, line in enumerate(columns(rows)):
            self._print(line, style="bold" if number == 0 else "")

    def failure(self, text: str) -> None:
        """Print what went wrong; may be several lines."""
        self._print(text, style="red")

    @contextmanager
    def working(self, what: str) -> Iterator[Progress]:
        """Show that something is going on, then how long it took.

        Yields:
            Call it with how far it is; away from a terminal this is a line now and then.
        """
        started = self._clock()
        if self._console.is_terminal:
            with self._console.status(Text(f"   {what}"), refresh_per_second=4) as status:
                yield _on(status, what)
        else:
            self.line(f"{what} ...")
            yield self._now_and_then(what)
        self.line(f"{what}: {self._clock() - started:.1f} s", style="dim")

    def _now_and_then(self, what: str) -> Progress:
        said = self._clock()

        def report(text: str) -> None:
            nonlocal said
            if self._clock() - said >= _QUIET_SECONDS:
                said = self._clock()
                self.line(f"{what}: {text}")

        return report

    def _print(self, text: str, *, style: str = "") -> None:
        # A terminal wraps by itself; elsewhere a line stays whole, so that it can be searched.
        self._console.print(Text(printable(text), style=style), soft_wrap=True)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines; the first column to the left, the others to the right."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - cell_len(first))]
        cells += [
            " " * (width - cell_len(cell)) + cell
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _on(status: Status, what: str) -> Progress:
    return lambda text: status.update(Text(printable(f"   {what}: {text}")))
