"""Examples for the OpenAPI page."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_TIME = "2030-01-31T12:00:00Z"

ERROR = {
    "error": {
        "message": "cube 'acme-suport' does not exist",
        "type": "not_found_error",
        "param": None,
        "code": "not_found",
    }
}

UNAVAILABLE = {
    "error": {
        "message": "the catalog does not answer (database is locked); try again",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
}

CUBE = {
    "id": "acme-support",
    "object": "memcube",
    "name": "Acme support",
    "description": "",
    "preamble": "",
    "labels": [],
    "owner": "local",
    "version": 12,
    "created_at": _TIME,
    "updated_at": _TIME,
    "memories": {"active": 40, "merged": 0, "archived": 2},
    "tiers": {"plaintext": 4, "activation": 36, "parametric": 0},
    "activation": {"state": "ready", "tokens": 3072, "bytes": 70778880, "resident_tokens": 3072},
    "adapter": None,
}

_SOURCE = {
    "kind": "handbook",
    "uri": "https://acme.example/handbook",
    "title": "Returns",
    "author": None,
    "created_at": None,
    "locator": "page 7",
}

MEMORY = {
    "id": "mem_01k9z3v7q0c4m8x2h5r6t1w9n",
    "object": "memory",
    "cube_id": "acme-support",
    "text": "Refunds take five working days.",
    "tags": ["refunds"],
    "labels": [],
    "metadata": {},
    "source": _SOURCE,
    "state": "active",
    "tier": "activation",
    "version": 1,
    "lineage": {"derived_from": [], "merged_into": None, "supersedes": []},
    "edges": [],
    "created_by": "local",
    "created_at": _TIME,
    "updated_at": _TIME,
    "expires_at": None,
    "usage": {"hits": 3, "last_used_at": _TIME},
}

KEY = {
    "id": "key_01k9z3v7q0c4m8x2h5r6t1w9n",
    "object": "key",
    "principal": "alice",
    "kind": "user",
    "admin": False,
    "prefix": "mos_k7f3q9xz",
    "state": "active",
    "created_at": _TIME,
    "created_by": "ops",
    "last_used_at": _TIME,
    "expires_at": None,
    "revoked_at": None,
}

NEW_KEY = {**KEY, "last_used_at": None, "key": "mos_k7f3q9xz_..."}

PRINCIPAL = {"id": "alice", "object": "principal", "kind": "user", "admin": False}

SEARCH = {
    "object": "list",
    "data": [
        {
            "memory": MEMORY,
            "score": 0.81,
            "scores": {"dense": 0.74, "sparse": 0.9, "graph": 0.0},
            "via": None,
        }
    ],
    "next_cursor": None,
    "pending": None,
}

DOCUMENT = {
    "object": "list",
    "data": [MEMORY],
    "next_cursor": None,
    "document": {
        "id": "mem_01k9z3v7q0c4m8x2h5r6t1w9m",
        "object": "document",
        "outcome": "added",
        "title": "Handbook",
        "uri": "handbook.md",
        "media_type": "text/markdown",
        "digest": "9f" * 32,
        "chunks": 1,
        "added": 1,
        "changed": 0,
        "archived": 0,
        "notes": [],
    },
}

MEMORY_VERSION = {
    "object": "memory.version",
    "memory_id": MEMORY["id"],
    "version": 1,
    "text": MEMORY["text"],
    "tags": ["refunds"],
    "labels": [],
    "metadata": {},
    "source": _SOURCE,
    "state": "active",
    "expires_at": None,
    "change": "added",
    "reason": None,
    "changed_by": "local",
    "changed_at": _TIME,
    "lineage": {"derived_from": [], "merged_into": None, "supersedes": []},
}

JOB = {
    "id": "job_01k9z3v7q0c4m8x2h5r6t1w9n",
    "object": "job",
    "cube_id": "acme-support",
    "kind": "bake",
    "state": "running",
    "progress": 0.5,
    "message": "prefilling 3072 tokens",
    "error": None,
    "proofs": [],
    "created_at": _TIME,
    "updated_at": _TIME,
}

STATS = {
    "object": "memcube.stats",
    "cube_id": "acme-support",
    "version": 12,
    "memories": CUBE["memories"],
    "tiers": {
        "activation": {
            "memories": 36,
            "text_bytes": 14000,
            "tokens": 3072,
            "artifact_bytes": 70778880,
        }
    },
    "artifacts": 1,
    "resident_tokens": 3072,
    "hits": 120,
    "hits_by_source": {"resident": 118, "store": 2},
    "prefill_tokens_saved": 368640,
    "prefill_seconds_saved": 210.5,
    "last_used_at": _TIME,
}

AUDIT = {
    "object": "audit.entry",
    "seq": 7,
    "at": _TIME,
    "actor": "local",
    "action": "memory.update",
    "cube_id": "acme-support",
    "subject": MEMORY["id"],
    "details": {"version": 2},
    "previous_hash": "9f" * 32,
    "hash": "3c" * 32,
}

AUDIT_LINES = (
    '{"seq": 7, "at": "2026-01-31T12:00:00.000000+00:00", "actor": "local", "action": '
    '"memory.update", "cube_id": "acme-support", "subject": "mem_01", "details": {}, '
    f'"previous_hash": "{"9f" * 32}", "hash": "{"3c" * 32}"}}\n'
    f'{{"object": "audit.head", "seq": 7, "hash": "{"3c" * 32}"}}\n'
)

GRANT = {
    "object": "grant",
    "cube_id": "acme-support",
    "principal": "ann",
    "role": "editor",
    "labels": ["finance"],
    "granted_by": "local",
    "granted_at": _TIME,
}

VERDICT = {
    "object": "audit.verdict",
    "ok": True,
    "entries": 120,
    "head_hash": "3c" * 32,
    "bad_seq": None,
    "problem": None,
    "message": "the audit log is whole",
}

STATUS = {
    "object": "memos.status",
    "version": "0.1.0",
    "residency": {"budget_tokens": 32768, "used_tokens": 3072},
    "guard": {"transfer_params_dropped": 0},
}

HEALTH = {"status": "ready", "parts": {"catalog": "ready", "engine": "ready"}}

EVENTS = 'event: progress\ndata: {"id": "job_01k9z3v7q0c4m8x2h5r6t1w9n", "progress": 0.5, ...}\n\n'


LOADED_CUBE = {
    **CUBE,
    "origin": "acme-support",
    "ids_mapped": 0,
    "memory_ids": {},
    "warnings": [],
}

DIFFERENCE: dict[str, Any] = {"kind": "only_here", "here": MEMORY, "there": None, "fields": []}


def page(item: object) -> dict[str, Any]:
    """A list of one."""
    return {"object": "list", "data": [item], "next_cursor": None}


def refusals(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` that every route has. With them FastAPI documents no 422 of its own: a bad
    request is a 400 here."""
    return {
        "4XX": {
            "model": model,
            "description": "Refused; the message says why and how to mend it.",
            "content": {"application/json": {"example": ERROR}},
        },
        503: unavailable(model),
    }


def unavailable(model: type[BaseModel], **more: Any) -> dict[str, Any]:
    """The answer of a part that is down; `more` stands in its example beside the error."""
    return {
        "model": model,
        "description": "A part is down or busy; try again after so many seconds.",
        "headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}},
        "content": {"application/json": {"example": {**UNAVAILABLE, **more}}},
    }


def answers(example: object, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: the same example for each status."""
    return {status: {"content": {"application/json": {"example": example}}} for status in statuses}
