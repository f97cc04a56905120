"""Who may do what: a table of roles, and how labels narrow it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.ids import CubeId, PrincipalId
from memos_vllm.errors import InvalidRequest

# One case only, so that no two principals differ by it.
PRINCIPAL_ID = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")


class PrincipalKind(StrEnum):
    """What stands behind a principal."""

    LOCAL = "local"
    USER = "user"
    AGENT = "agent"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. An administrator may do everything to every cube."""

    id: PrincipalId
    kind: PrincipalKind = PrincipalKind.USER
    admin: bool = False


# Everyone on a loopback-only server that has no key yet.
LOCAL_ADMIN = Principal(PrincipalId("local"), PrincipalKind.LOCAL, admin=True)
# Jobs, expiry and the engine; it signs audit rows and calls nothing that asks for an actor.
SYSTEM = Principal(PrincipalId("system"), PrincipalKind.SERVICE, admin=True)
_RESERVED = frozenset({LOCAL_ADMIN.id, SYSTEM.id})


def check_principal_id(value: str, *, param: str = "principal") -> PrincipalId:
    """`value` itself when a principal that is not one of ours may be called so.

    Raises:
        InvalidRequest: other characters, too long, or reserved.
    """
    if PRINCIPAL_ID.fullmatch(value) is None:
        raise InvalidRequest(
            f"{param} must be 1 to 64 of a-z, 0-9, '.', '_', '@' and '-', and start with a letter "
            "or a digit",
            param=param,
        )
    if value in _RESERVED:
        raise InvalidRequest(f"'{value}' is reserved; choose another name", param=param)
    return PrincipalId(value)


class Role(StrEnum):
    """What a grant makes a principal of a cube."""

    READER = "reader"
    EDITOR = "editor"
    OWNER = "owner"
    AUDITOR = "auditor"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a principal may do with a cube, who said so and when.

    The cube's `owner` has one too, from the cube's beginning, that nobody gave.

    Args:
        labels: what a reader or editor sees and sets besides what has no label; an owner needs
            none, and an auditor sees no memories.
    """

    cube_id: CubeId
    principal: PrincipalId
    role: Role
    labels: tuple[str, ...]
    granted_by: PrincipalId
    granted_at: datetime


class Access(StrEnum):
    """What can be done to a cube: see that it exists, read, write, manage it, read its audit."""

    SEE = "see"
    READ = "read"
    WRITE = "write"
    MANAGE = "manage"
    AUDIT = "audit"


_ALLOWED: dict[Role, frozenset[Access]] = {
    Role.READER: frozenset({Access.SEE, Access.READ}),
    Role.EDITOR: frozenset({Access.SEE, Access.READ, Access.WRITE}),
    Role.OWNER: frozenset(Access),
    Role.AUDITOR: frozenset({Access.SEE, Access.AUDIT}),
}


def allows(role: Role, verb: Access) -> bool:
    """Whether `role` on a cube is enough for `verb`."""
    return verb in _ALLOWED[role]


def roles_that_allow(verb: Access) -> tuple[Role, ...]:
    """Every role that is enough for `verb`, in a fixed order."""
    return tuple(role for role in Role if verb in _ALLOWED[role])


def sees_labels(role: Role, granted: Iterable[str], labels: Iterable[str]) -> bool:
    """Whether a memory with `labels` is visible: to owners, and to a grant that holds them all."""
    return role is Role.OWNER or set(labels) <= set(granted)
