"""Dates written in text, as terms that meet whichever way each side writes them.

"8 May 2023", "May 8th, 2023" and "2023-05-08" share the terms of that day, month and year. Dates
of which a reader could not tell day from month, such as 08/05/2023, are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date

_MONTHS = (
    "january february march april may june july august september october november december"
).split()
_NUMBER = {name: index for index, name in enumerate(_MONTHS, start=1)}
_NUMBER |= {name[:3]: index for name, index in _NUMBER.items()} | {"sept": 9}
_MONTH = "|".join(sorted(_NUMBER, key=len, reverse=True))
_DAY = r"[0-3]?\d(?:st|nd|rd|th)?"
_YEAR = r"[12]\d{3}"

_WRITTEN = re.compile(
    rf"\b(?:(?P<iso>{_YEAR}-[01]\d(?:-[0-3]\d)?)(?![\d-])"
    rf"|(?P<day>{_DAY})\s+(?:of\s+)?(?P<month>{_MONTH})\b\.?(?:,?\s+(?P<year>{_YEAR})\b)?"
    rf"|(?P<month2>{_MONTH})\b\.?\s+(?P<day2>{_DAY})\b(?:,?\s+(?P<year2>{_YEAR})\b)?"
    rf"|(?P<month3>{_MONTH})\b\.?,?\s+(?:of\s+)?(?P<year3>{_YEAR})\b)"
)
_MAX_DATES = 32


def date_terms(text: str) -> list[str]:
    """The terms of the first 32 dates in lower-case `text`, without doubles.

    A full date gives its day, its month and its day in any year; what it leaves out gives none.
    """
    found: dict[str, None] = {}
    for index, match in enumerate(_WRITTEN.finditer(text)):
        if index == _MAX_DATES:
            break
        found |= dict.fromkeys(_terms(*_parts(match)))
    return list(found)


def written(day: date) -> str:
    """`day` in the words that people search for it with."""
    return f"{day.day} {_MONTHS[day.month - 1].capitalize()} {day.year}"


def _parts(match: re.Match[str]) -> tuple[int | None, int, int | None]:
    iso = match["iso"]
    if iso is not None:
        year, month, *day = map(int, iso.split("-"))
        return year, month, day[0] if day else None
    month_name = match["month"] or match["month2"] or match["month3"]
    written_year = match["year"] or match["year2"] or match["year3"]
    written_day = match["day"] or match["day2"]
    return (
        int(written_year) if written_year else None,
        _NUMBER[month_name],
        int(re.sub(r"\D", "", written_day)) if written_day else None,
    )


def _terms(year: int | None, month: int, day: int | None) -> Iterator[str]:
    if not 1 <= month <= 12 or (day is not None and not 1 <= day <= 31):
        return
    if year is not None:
        yield f"date:{year:04}-{month:02}"
    if day is not None:
        yield f"date:{month:02}-{day:02}"
        if year is not None:
            yield f"date:{year:04}-{month:02}-{day:02}"
