"""What the domain holds callers to, as JSON Schema for the OpenAPI page.

Only told here: it is the domain that checks, with messages that say more than pydantic's would.
Lengths of texts are in characters; the limit itself is in bytes of UTF-8.
"""

from __future__ import annotations

import re
from typing import Any, Final

from memos_vllm.domain.access import PRINCIPAL_ID
from memos_vllm.domain.checks import MAX_TEXT_BYTES, MAX_WORD_CHARS, MAX_WORDS
from memos_vllm.domain.cube import CUBE_ID as _CUBE_ID
from memos_vllm.domain.cube import MAX_NAME_CHARS
from memos_vllm.domain.memory import EDGE_KIND, MAX_BATCH, MAX_EDGES, MAX_REASON_CHARS
from memos_vllm.domain.merge import MAX_PARENTS
from memos_vllm.domain.search import MAX_HOPS, MAX_TOP_K
from memos_vllm.domain.turn import MAX_SESSION_CHARS, ROLES

Schema = dict[str, Any]


def line(max_chars: int) -> Schema:
    """One line that is not blank."""
    return {"minLength": 1, "maxLength": max_chars}


def _like(pattern: re.Pattern[str]) -> Schema:
    return {"pattern": f"^{pattern.pattern}$"}


CUBE_ID: Final[Schema] = _like(_CUBE_ID)
PRINCIPAL: Final[Schema] = _like(PRINCIPAL_ID)
KIND: Final[Schema] = _like(EDGE_KIND)
NAME: Final[Schema] = line(MAX_NAME_CHARS)
REASON: Final[Schema] = line(MAX_REASON_CHARS)
SESSION: Final[Schema] = line(MAX_SESSION_CHARS)
TEXT: Final[Schema] = line(MAX_TEXT_BYTES)
LONG_TEXT: Final[Schema] = {"maxLength": MAX_TEXT_BYTES}
# Tags or labels.
WORDS: Final[Schema] = {"maxItems": MAX_WORDS, "items": {"type": "string", **line(MAX_WORD_CHARS)}}
EDGES: Final[Schema] = {"maxItems": MAX_EDGES}
WEIGHT: Final[Schema] = {"minimum": 0, "maximum": 1}
BATCH: Final[Schema] = {"minItems": 1, "maxItems": MAX_BATCH}
PARENTS: Final[Schema] = {"minItems": 2, "maxItems": MAX_PARENTS, "uniqueItems": True}
TOP_K: Final[Schema] = {"minimum": 1, "maximum": MAX_TOP_K}
HOPS: Final[Schema] = {"minimum": 0, "maximum": MAX_HOPS}
ROLE: Final[Schema] = {"enum": list(ROLES)}
# Which memories move: named, or all of them.
MEMORIES_ONCE: Final[Schema] = {
    "oneOf": [
        {
            "required": ["memory_ids"],
            "properties": {
                "memory_ids": {
                    "anyOf": [{"const": "all"}, {"type": "array", "minItems": 1}],
                },
                "all": {"const": False},
            },
        },
        {
            "required": ["all"],
            "properties": {"memory_ids": {"type": "null"}, "all": {"const": True}},
        },
    ]
}
VERSION: Final[Schema] = {"pattern": r'^(\*|(W/)?"?[0-9]{1,18}"?)$'}
KEY: Final[Schema] = {"pattern": "^[!-~]{1,255}$"}
