"""Dense vectors as the catalog keeps them: 16-bit floats, little-endian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memos_vllm.plaintext.embedders.base import Vectors
from memos_vllm.plaintext.index.base import DenseVector


def packed(vector: DenseVector) -> bytes:
    """[dim] as 2 * dim bytes."""
    return vector.astype("<f2").tobytes()


def unpacked(stored: bytes) -> DenseVector:
    """[dim], brought back to length 1; zeros stay."""
    vector: DenseVector = unpacked_rows([stored], len(stored) // 2)[0]
    return vector


def unpacked_rows(stored: Sequence[bytes | None], dim: int) -> Vectors:
    """[n, dim], each of length 1; 0 for what is zero, missing or of another dimension."""
    nothing = bytes(2 * dim)
    whole = (row if row is not None and len(row) == 2 * dim else nothing for row in stored)
    rows = np.frombuffer(b"".join(whole), dtype="<f2").reshape(-1, dim).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    vectors: Vectors = rows / np.where(lengths > 0, lengths, np.float32(1))
    return vectors
