"""What models of a few families want in front of a query or a document.

For servers and libraries that do not add it themselves. Other models get the plain text.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Prefixes(NamedTuple):
    query: str
    document: str


_RELEVANT_PASSAGES = "Represent this sentence for searching relevant passages: "
_WEB_SEARCH = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)

# The first that the name matches, as each model's card says.
_FAMILIES = (
    (r"\be5-mistral|\be5-[a-z-]*instruct", Prefixes(f"{_WEB_SEARCH} ", "")),
    (r"\be5-", Prefixes("query: ", "passage: ")),
    (r"\bbge-(small|base|large)-en\b", Prefixes(_RELEVANT_PASSAGES, "")),
    (r"\bmxbai-embed\b", Prefixes(_RELEVANT_PASSAGES, "")),
    (r"\bsnowflake-arctic-embed\b.*-v2", Prefixes("query: ", "")),
    (r"\bsnowflake-arctic-embed\b", Prefixes(_RELEVANT_PASSAGES, "")),
    (r"\bnomic-embed-text\b", Prefixes("search_query: ", "search_document: ")),
    (r"\bqwen3-embedding\b", Prefixes(_WEB_SEARCH, "")),
    (r"\bembeddinggemma\b", Prefixes("task: search result | query: ", "title: none | text: ")),
)
_PLAIN = Prefixes("", "")


def prefixes_of(model: str) -> Prefixes:
    """The prefixes of the model with this name, or of a path that ends with it."""
    for pattern, prefixes in _FAMILIES:
        if re.search(pattern, model, re.IGNORECASE):
            return prefixes
    return _PLAIN
