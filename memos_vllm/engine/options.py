"""The memory fields of a chat request, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from memos_vllm.domain.checks import check_line
from memos_vllm.domain.cube import validate_cube_id
from memos_vllm.errors import InvalidRequest

MAX_CUBES = 8


@dataclass(frozen=True, slots=True)
class RetrieveOptions:
    """How much is looked up for a chat; without `max_tokens` a share of the model's context."""

    top_k: int = 8
    max_tokens: int | None = None


class RememberMode(StrEnum):
    """How a turn is kept: as it was said, or also as the facts that a reader finds in it."""

    FAST = "fast"
    FINE = "fine"


@dataclass(frozen=True, slots=True)
class RememberOptions:
    """How a turn is kept, and in which of the chat's cubes: the first one when `into` is None."""

    mode: RememberMode = RememberMode.FAST
    into: str | None = None

    def cube_among(self, cube_ids: Sequence[str]) -> str:
        """The cube that the turn goes to; raises InvalidRequest when the chat does not name it."""
        if self.into is None:
            return cube_ids[0]
        if self.into not in cube_ids:
            raise InvalidRequest(
                "memos.remember.into must be one of the cubes in memcube_id",
                param="memos.remember.into",
            )
        return self.into


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """The `memos` object of a request, checked; `retrieve` and `remember` are None for no."""

    activation: bool = True
    session_id: str | None = None
    retrieve: RetrieveOptions | None = RetrieveOptions()
    remember: RememberOptions | None = None


def parse_cube_ids(memcube_id: object, alias: object) -> list[str]:
    """The cubes that a request names, in order, each once.

    Raises:
        InvalidRequest: neither a cube id nor a list of one to eight of them.
    """
    if memcube_id is not None and alias is not None and memcube_id != alias:
        raise InvalidRequest(
            "memcube_id and its alias mem_cube_id name different cubes; send one of them",
            param="mem_cube_id",
        )
    value = memcube_id if memcube_id is not None else alias
    if value is None:
        raise InvalidRequest("memos needs memcube_id, the cube to use", param="memcube_id")
    ids = [value] if isinstance(value, str) else value
    if not isinstance(ids, list) or not all(isinstance(cube, str) for cube in ids):
        raise InvalidRequest(
            f"memcube_id must be a cube id or a list of up to {MAX_CUBES} cube ids, "
            f"not {type(value).__name__}",
            param="memcube_id",
        )
    if not 1 <= len(ids) <= MAX_CUBES:
        raise InvalidRequest(
            f"memcube_id names {len(ids)} cubes; send 1 to {MAX_CUBES}", param="memcube_id"
        )
    for cube in ids:
        validate_cube_id(cube, param="memcube_id")
    return list(dict.fromkeys(ids))


def parse_options(value: object) -> MemoryOptions:
    """The `memos` object of a request.

    Raises:
        InvalidRequest: an unknown field or a wrong type; the message names it.
    """
    if value is None:
        return MemoryOptions()
    if not isinstance(value, dict):
        raise InvalidRequest("memos must be an object", param="memos")
    known = {"session_id", "retrieve", "activation", "adapter", "remember"}
    if unknown := sorted(set(value) - known):
        raise InvalidRequest(
            f"memos has no field {unknown[0]!r}; it takes {', '.join(sorted(known))}",
            param=f"memos.{unknown[0]}",
        )
    for name in ("activation", "adapter"):
        if not isinstance(value.get(name, False), bool):
            raise InvalidRequest(f"memos.{name} must be true or false", param=f"memos.{name}")
    session = value.get("session_id")
    if session is not None and (not isinstance(session, str) or not 0 < len(session) <= 256):
        raise InvalidRequest(
            "memos.session_id must be a string of 1 to 256 characters", param="memos.session_id"
        )
    if session is not None:
        check_line(session, param="memos.session_id", max_chars=256)
    return MemoryOptions(
        activation=value.get("activation", True),
        session_id=session,
        retrieve=_retrieve(value.get("retrieve")),
        remember=_remember(value.get("remember")),
    )


def _retrieve(value: object) -> RetrieveOptions | None:
    if value is None:
        return RetrieveOptions()
    if value is False:
        return None
    if not isinstance(value, dict) or set(value) - {"top_k", "max_tokens"}:
        raise InvalidRequest(
            "memos.retrieve must be false or an object with top_k and max_tokens",
            param="memos.retrieve",
        )
    for name, most in (("top_k", 1000), ("max_tokens", 1_000_000)):
        number = value.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            raise InvalidRequest(
                f"memos.retrieve.{name} must be a whole number from 1 to {most}",
                param=f"memos.retrieve.{name}",
            )
    return RetrieveOptions(**value)


def _remember(value: object) -> RememberOptions | None:
    if value is None or value is False:
        return None
    if value is True:
        return RememberOptions()
    if not isinstance(value, dict) or set(value) - {"mode", "into"}:
        raise InvalidRequest(
            "memos.remember must be true, false or an object with mode and into",
            param="memos.remember",
        )
    into = value.get("into")
    if into is not None:
        into = validate_cube_id(into, param="memos.remember.into")
    mode = value.get("mode", RememberMode.FAST)
    if not isinstance(mode, str) or mode not in set(RememberMode):
        raise InvalidRequest(
            f"memos.remember.mode must be one of {', '.join(RememberMode)}",
            param="memos.remember.mode",
        )
    return RememberOptions(RememberMode(mode), into)
