"""Rows of a table as text that stands alone: every cell keeps the words of its column's header."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.document import Block, BlockKind

# Tables of people have fewer; a span of 65,535 columns is meant to fill the memory.
_MAX_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell as it stands in the file.

    Args:
        columns, rows: how many it covers.
        is_header: marked as the header of its column or row.
        continues: it is covered by the cell above it and has no text of its own.
    """

    text: str
    columns: int = 1
    rows: int = 1
    is_header: bool = False
    continues: bool = False


@dataclass(slots=True)
class _Carried:
    cell: Cell
    rows_left: int


def table_blocks(rows: Iterable[Sequence[Cell]], *, header_rows: int | None = None) -> list[Block]:
    """One block per row that has text.

    Args:
        header_rows: how many rows at the top are headers; None counts those in which every cell
            is marked as one.
    """
    grid = _grid(rows)
    if header_rows is None:
        header_rows = sum(1 for _ in takewhile(lambda row: all(c.is_header for c in row), grid))
    headers = _column_headers(grid[:header_rows])
    body = grid[header_rows:]
    blocks = [block for row in body for block in _row_block(row, headers)]
    if not blocks:
        # A table of nothing but headers still says something.
        return [block for row in grid for block in _row_block(row, ())]
    return blocks


def _grid(rows: Iterable[Sequence[Cell]]) -> list[list[Cell]]:
    """Rows with one cell per column; a cell that covers several stands in each."""
    grid: list[list[Cell]] = []
    carried: dict[int, _Carried] = {}
    for row in rows:
        cells: list[Cell] = []
        pending = list(reversed(row))
        while pending or carried.get(len(cells)) is not None:
            if len(cells) >= _MAX_COLUMNS:
                cells.extend(reversed(pending))
                break
            above = carried.get(len(cells))
            if above is not None:
                cells.append(above.cell)
                above.rows_left -= 1
                if above.rows_left == 0:
                    del carried[len(cells) - 1]
                continue
            _place(pending.pop(), cells, carried, grid)
        if cells:
            grid.append(cells)
    return grid


def _place(
    cell: Cell, cells: list[Cell], carried: dict[int, _Carried], grid: list[list[Cell]]
) -> None:
    if cell.continues and grid and len(cells) < len(grid[-1]):
        cell = Cell(grid[-1][len(cells)].text, columns=cell.columns)
    else:
        cell = Cell(clean_line(cell.text), cell.columns, cell.rows, cell.is_header)
    for _ in range(min(max(cell.columns, 1), _MAX_COLUMNS - len(cells))):
        if cell.rows > 1:
            carried[len(cells)] = _Carried(cell, cell.rows - 1)
        cells.append(cell)


def _column_headers(rows: Sequence[Sequence[Cell]]) -> tuple[str, ...]:
    width = max((len(row) for row in rows), default=0)
    return tuple(
        " / ".join(dict.fromkeys(row[i].text for row in rows if i < len(row) and row[i].text))
        for i in range(width)
    )


def _row_block(row: Sequence[Cell], headers: Sequence[str]) -> list[Block]:
    parts: list[str] = []
    previous: Cell | None = None
    for column, cell in enumerate(row):
        # A cell over several columns is one object in each of them.
        if not cell.text or cell is previous:
            continue
        previous = cell
        name = headers[column] if column < len(headers) and cell.columns == 1 else ""
        parts.append(f"{name}: {cell.text}" if name and name != cell.text else cell.text)
    if not parts:
        return []
    if not headers and len(parts) == 2 and row[0].is_header:
        return [_joined(parts, ": ")]
    return [_joined(parts, "; " if any(headers) else " | ")]


def _joined(parts: Sequence[str], separator: str) -> Block:
    cuts: list[int] = []
    position = 0
    for part in parts[:-1]:
        position += len(part) + len(separator)
        cuts.append(position)
    return Block(BlockKind.TABLE_ROW, separator.join(parts), cuts=tuple(cuts))
