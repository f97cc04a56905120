"""How filter fields are written into a point's payload: ids, numbers and digests, no text.

    cube, v                             the cube's id, the memory's version
    labels                              as they are; absent where there are none
    facts                               a digest for each tag, the tier, each field of the source,
                                        and each pair of a metadata path and a scalar there
    num                                 [{"p": digest of a metadata path, "x": a number there}]
    created_at, updated_at, expires_at  seconds since 1970; `NEVER` where there is no end

Digests make every word safe as it is, whatever it holds and however long. All that is compared for
equality shares one payload index, since each index costs files, memory and a part of every flush.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Any, TypeAlias

from memos_vllm.domain.filters import numbers
from memos_vllm.domain.scope import FilterFields, Scalar
from memos_vllm.plaintext.index.base import IndexPoint

Payload: TypeAlias = dict[str, Any]

# The year 10000, which no datetime reaches; so one range decides, without asking for absence.
NEVER = 253402300800.0
_DIGEST_BYTES = 12


class FieldKind(Enum):
    """How a payload field is indexed."""

    TENANT = "tenant"
    KEYWORD = "keyword"
    FLOAT = "float"


PAYLOAD_INDEXES: dict[str, FieldKind] = {
    "cube": FieldKind.TENANT,
    "labels": FieldKind.KEYWORD,
    "facts": FieldKind.KEYWORD,
    "num[].p": FieldKind.KEYWORD,
    "num[].x": FieldKind.FLOAT,
    "created_at": FieldKind.FLOAT,
    "updated_at": FieldKind.FLOAT,
    "expires_at": FieldKind.FLOAT,
}


def payload_of(point: IndexPoint) -> Payload:
    """The payload of a point; JSON types only."""
    fields = point.fields
    payload: Payload = {
        "cube": point.cube_id,
        "v": point.version,
        "facts": _facts(fields),
        "created_at": fields.created_at,
        "updated_at": fields.updated_at,
        "expires_at": NEVER if fields.expires_at is None else fields.expires_at,
    }
    if fields.labels:
        payload["labels"] = list(fields.labels)
    ranged = [
        {"p": path_token(path), "x": number}
        for path, values in fields.metadata.items()
        for number in dict.fromkeys(numbers(values))
    ]
    if ranged:
        payload["num"] = ranged
    return payload


def _facts(fields: FilterFields) -> list[str]:
    facts = [fact("tier", fields.tier.value)]
    facts += [fact("tag", tag) for tag in fields.tags]
    facts += [fact(name, value) for name, value in fields.source.items()]
    for path, values in fields.metadata.items():
        facts += [metadata_fact(path, value) for value in values]
    return list(dict.fromkeys(facts))


def fact(name: str, value: str) -> str:
    """Something that a memory is or has, as a short word."""
    return _digest(name, value)


def path_token(path: str) -> str:
    """A metadata path as a short word."""
    return _digest("path", path)


def metadata_fact(path: str, value: Scalar) -> str:
    """A metadata path and one scalar there as a short word; equal numbers give equal words."""
    if isinstance(value, bool):
        return _digest("metadata", path, "bool", str(value))
    if isinstance(value, str):
        return _digest("metadata", path, "str", value)
    # 2.0 is 2, and an integer beyond 2^53 is not the double next to it.
    exact = int(value) if isinstance(value, float) and value.is_integer() else value
    return _digest("metadata", path, "number", repr(exact))


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode()
        # Lengths keep ("a", "bc") and ("ab", "c") apart.
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
