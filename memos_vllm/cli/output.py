"""What the commands print: tables and progress on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# A memory's text may hold escape sequences that a terminal would obey.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

Progress = Callable[[float, str], None]


def printable(text: str) -> str:
    """Text with its control characters spelled out; line ends and tabs stay."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str, *, limit: int = 0) -> str:
    """The text on one line, cut to `limit` characters if that is above 0."""
    line = " ".join(printable(text).split())
    return line if not limit or len(line) <= limit else f"{line[: limit - 1]}…"


def say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")


def note(text: str) -> None:
    """A remark that is not part of the result."""
    sys.stderr.write(f"{printable(text)}\n")


def say_json(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value, ensure_ascii=False, indent=2, default=str)}\n")


def say_json_list(items: Sequence[object]) -> None:
    say_json({"object": "list", "data": list(items)})


def say_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    below: Sequence[Sequence[str]] = (),
) -> None:
    """Columns with heads on a terminal; elsewhere one line a row, tabs between its cells.

    Args:
        below: lines to put under each row, indented and never cut.
    """
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    style, end = "", ""
    if sys.stdout.isatty():
        head, *lines = _aligned([list(heads), *cells], width=os.get_terminal_size(1).columns)
        sys.stdout.write(f"\x1b[1m{head}\x1b[0m\n")
        style, end = _DIM, _PLAIN
    else:
        lines = ["\t".join(row) for row in cells]
    for line, asides in itertools.zip_longest(lines, below, fillvalue=()):
        sys.stdout.write(f"{line}\n")
        sys.stdout.writelines(f"    {style}{one_line(aside)}{end}\n" for aside in asides)


def _aligned(rows: Sequence[Sequence[str]], *, width: int) -> list[str]:
    """Rows as lines. Only the last column is cut: the ids in the first ones are for copying."""
    # It knows which characters take two columns.
    from rich.cells import cell_len, set_cell_size

    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    room = max(20, width - sum(widths) - 2 * len(widths))
    lines = []
    for *cells, last in rows:
        padded = [set_cell_size(cell, size) for cell, size in zip(cells, widths, strict=True)]
        cut = last if cell_len(last) <= room else f"{set_cell_size(last, room - 1).rstrip()}…"
        lines.append("  ".join([*padded, cut]).rstrip())
    return lines


def say_dim(text: str) -> None:
    """An aside after a result: dim on a terminal, on stderr elsewhere, to keep stdout clean."""
    if sys.stdout.isatty():
        sys.stdout.write(f"{_DIM}{printable(text)}{_PLAIN}\n")
    else:
        note(text)


@contextmanager
def progress(title: str, *, silent: bool = False) -> Iterator[Progress]:
    """Reports a share done from 0 to 1 and what is going on.

    A bar on a terminal, a line on stderr for each change elsewhere, nothing when silent.
    """
    if silent:
        yield lambda _share, _message: None
    elif sys.stderr.isatty():
        with _bar(title) as report:
            yield report
    else:
        yield _Lines(title)


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._last = ""

    def __call__(self, share: float, message: str) -> None:
        line = f"{self._title}: {share:.0%} {one_line(message)}".rstrip()
        if line != self._last:
            note(line)
            self._last = line


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title), total=1.0, message="")

        def report(share: float, message: str) -> None:
            bar.update(task, completed=share, message=escape(one_line(message, limit=60)))

        yield report


def size(num_bytes: float) -> str:
    """Bytes in a unit that a person reads."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
