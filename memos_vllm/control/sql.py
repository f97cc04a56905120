"""Pieces of SQL that SQLAlchemy has no words for, alike on every database."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    CursorResult,
    Dialect,
    Select,
    Text,
    bindparam,
    cast,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine


class Prepared:
    """A statement that every search runs: made into the driver's SQL once for each dialect.

    Its rows are plain tuples. Without it, half of the time of a small statement is SQLAlchemy's
    look for the SQL that it made before (0.06 ms of 0.1, and more once other work had the caches).
    """

    def __init__(
        self, statement: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]]
    ) -> None:
        self._statement = statement
        self._made: dict[str, _Made] = {}

    def rows(self, session: Session, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run it with a value for every parameter."""
        connection = session.connection()
        dialect = connection.dialect
        made = self._made.get(dialect.name)
        if made is None:
            made = self._made[dialect.name] = _Made.of(self._statement, dialect)
        return made.read(connection.exec_driver_sql(made.sql, made.given(parameters)))

    def values(self, session: Session, parameters: Mapping[str, Any]) -> list[Any]:
        """The first column of its rows."""
        return [row[0] for row in self.rows(session, parameters)]


@dataclass(slots=True)
class _Made:
    """A statement in a driver's words, and how values go in and come out.

    How they come out may hang on what the database calls their types: see `read`.
    """

    sql: str
    names: Sequence[str]
    positional: bool
    fixed: Mapping[str, Any]
    into: Mapping[str, Callable[[Any], Any]]
    dialect: Dialect
    types: Sequence[TypeEngine[Any]]
    out: Sequence[tuple[int, Callable[[Any], Any]]] | None = None

    @classmethod
    def of(
        cls,
        statement: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]],
        dialect: Dialect,
    ) -> _Made:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        into = {
            name: bound.type.dialect_impl(dialect).bind_processor(dialect)
            for name, bound in compiled.binds.items()
        }
        return cls(
            sql=str(compiled),
            names=compiled.positiontup or list(compiled.binds),
            positional=compiled.positiontup is not None,
            fixed={name: b.value for name, b in compiled.binds.items() if not b.required},
            into={name: change for name, change in into.items() if change is not None},
            dialect=dialect,
            types=[column.type.dialect_impl(dialect) for column in statement.selected_columns],
        )

    def given(self, parameters: Mapping[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
        values = {**self.fixed, **parameters}
        changed = {name: self._changed(name, values[name]) for name in self.names}
        return tuple(map(changed.__getitem__, self.names)) if self.positional else changed

    def read(self, result: CursorResult[Any]) -> list[tuple[Any, ...]]:
        if self.out is None:
            assert result.cursor is not None
            changes = (
                kind.result_processor(self.dialect, column[1])
                for kind, column in zip(self.types, result.cursor.description, strict=True)
            )
            self.out = [(place, one) for place, one in enumerate(changes) if one is not None]
        found = result.all()
        if not self.out:
            return list(map(tuple, found))
        rows = []
        for row in found:
            values = list(row)
            for place, change in self.out:
                values[place] = change(values[place])
            rows.append(tuple(values))
        return rows

    def _changed(self, name: str, value: Any) -> Any:
        change = self.into.get(name)
        return value if change is None else change(value)


def one_of(
    column: ColumnElement[Any] | InstrumentedAttribute[Any], parameter: str
) -> ColumnElement[bool]:
    """Condition: the column is one of the values of a list that is given as one parameter.

    The statement stays the same whatever the list's length, so that neither SQLAlchemy nor the
    database compiles it anew, and no number of values is too many.
    """
    values = _JsonValues(bindparam(parameter, type_=_JsonList)).table_valued("value")
    return column.in_(select(cast(values.c.value, column.type)))


def unindexed(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """The column, in a condition that SQLite is not to look rows up by.

    Without statistics, SQLite takes "of this cube" for fewer rows than fifty given numbers, and
    reads the whole cube.
    """
    return _Unindexed(column)


class _JsonList(TypeDecorator[Sequence[Any]]):
    """Strings or whole numbers, sent as JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> str:
        """To JSON; no list is a bug of ours."""
        assert value is not None, "a list, even an empty one"
        return json.dumps(list(value))


class _JsonValues(FunctionElement[Any]):
    """The values of a JSON array, as rows of one column `value`."""

    name = "json_values"
    inherit_cache = True


@compiles(_JsonValues)
def _to_elements(element: _JsonValues, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **options)} AS JSON))"


@compiles(_JsonValues, "sqlite")
def _to_each(element: _JsonValues, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


class _Unindexed(FunctionElement[Any]):
    name = "unindexed"
    inherit_cache = True

    def __init__(self, column: InstrumentedAttribute[Any]) -> None:
        super().__init__(column)
        self.type = column.type


@compiles(_Unindexed)
def _bare(element: _Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(_Unindexed, "sqlite")
def _with_plus(element: _Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"
