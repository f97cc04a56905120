"""Text to vectors, for search: one protocol, and the models behind it by setting.

`create_embedder` reads the setting. What a model needs is imported only when that model is asked
for.
"""

from memos_vllm.plaintext.embedders.base import CachedEmbedder, Embedder, Encoder, Vectors
from memos_vllm.plaintext.embedders.create import DEFAULT_EMBEDDER, create_embedder

__all__ = [
    "DEFAULT_EMBEDDER",
    "CachedEmbedder",
    "Embedder",
    "Encoder",
    "Vectors",
    "create_embedder",
]
