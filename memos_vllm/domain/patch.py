"""The difference between "not given" and "set to nothing" in a change."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Unset(Enum):
    """Type of `UNSET`, the value of a patch field that the caller left out."""

    TOKEN = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.TOKEN
