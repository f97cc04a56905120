"""Keys and principals as the server tells of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from memos_vllm.client.fields import Fields
from memos_vllm.client.objects import Json


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key; `state` is active, expired or revoked, `last_used_at` is to the minute."""

    id: str
    principal: str
    kind: str
    admin: bool
    prefix: str
    state: str
    created_at: datetime
    created_by: str
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> KeyInfo:
        key = Fields(body, "key")
        return cls(
            id=key.text("id"),
            principal=key.text("principal"),
            kind=key.text("kind"),
            admin=key.flag("admin"),
            prefix=key.text("prefix"),
            state=key.text("state"),
            created_at=key.time("created_at"),
            created_by=key.text("created_by"),
            last_used_at=key.optional_time("last_used_at"),
            expires_at=key.optional_time("expires_at"),
            revoked_at=key.optional_time("revoked_at"),
            raw=key.raw,
        )


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was made just now, with the token that its owner sends."""

    info: KeyInfo
    token: str = field(repr=False)

    @classmethod
    def from_json(cls, body: object) -> NewKey:
        key = Fields(body, "key")
        known = {name: value for name, value in key.raw.items() if name != "key"}
        return cls(KeyInfo.from_json(known), key.text("key"))


@dataclass(frozen=True, slots=True)
class PrincipalInfo:
    """Whom a key stands for; `kind` is user, agent, service, or local before the first key."""

    id: str
    kind: str
    admin: bool

    @classmethod
    def from_json(cls, body: object) -> PrincipalInfo:
        principal = Fields(body, "principal")
        return cls(principal.text("id"), principal.text("kind"), principal.flag("admin"))
