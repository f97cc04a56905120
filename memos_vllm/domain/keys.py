"""API keys: how one looks, how it is drawn, and what is known of it afterwards."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.access import Principal, PrincipalKind
from memos_vllm.domain.ids import PrincipalId

# `mos_`, eight letters that are public, 256 random bits in base64url.
_TOKEN = re.compile(r"(mos_[0-9a-z]{8})_[A-Za-z0-9_-]{43}")
_PREFIX_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_SECRET_BYTES = 32


class KeyState(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class KeyDigest:
    """What the catalog keeps of a key: enough to recognise it, useless to whoever reads it."""

    prefix: str
    sha256: bytes


@dataclass(frozen=True, slots=True)
class DrawnKey:
    """A new key. The token is shown to its owner once and never stored."""

    token: str = field(repr=False)
    digest: KeyDigest


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as administrators see it."""

    id: str
    principal: PrincipalId
    kind: PrincipalKind
    admin: bool
    prefix: str
    created_at: datetime
    created_by: str
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    state: KeyState


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whom a valid key stands for."""

    principal: Principal
    key_id: str
    expires_at: datetime | None
    last_used_at: datetime | None


def draw_key() -> DrawnKey:
    """A new random key."""
    letters = "".join(secrets.choice(_PREFIX_ALPHABET) for _ in range(8))
    token = f"mos_{letters}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return DrawnKey(token, KeyDigest(f"mos_{letters}", digest_of(token)))


def digest_of(token: str) -> bytes:
    """SHA-256 of a key, by which it is stored and found.

    A slow hash guards passwords, which can be guessed; nobody guesses 256 random bits. Finding a
    key by its digest leaks no more through time than parts of a hash that no caller can steer.
    """
    return hashlib.sha256(token.encode("ascii")).digest()


def is_token(text: str) -> bool:
    """Whether a text has the form of a key."""
    return _TOKEN.fullmatch(text) is not None


def public_part(text: str) -> str:
    """A key's prefix when the text is a whole key, and otherwise the text itself."""
    match = _TOKEN.fullmatch(text)
    return text if match is None else match[1]


def redact_keys(text: str) -> str:
    """The text with every key in it cut down to its prefix."""
    return _TOKEN.sub(r"\1_…", text) if "mos_" in text else text
