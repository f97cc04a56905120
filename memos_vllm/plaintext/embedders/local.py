"""Models that other libraries run in this process: sentence-transformers and FastEmbed.

Neither library is a dependency: each is imported when its setting asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from memos_vllm.errors import ConfigurationError
from memos_vllm.plaintext.embedders.base import Vectors
from memos_vllm.plaintext.embedders.prefixes import prefixes_of

# A query waits for the slice under way, never for all documents of a call.
SLICE_TEXTS = 32
_COMMON_MAX_TOKENS = 512
_DIGEST_CHARS = 16


class SentenceTransformersEncoder:
    """A sentence-transformers model, on the CPU: a GPU's memory belongs to the served model.

    Longer texts are cut at the model's own limit. The model's own prompts are used; where it has
    none, those of `memos_vllm.plaintext.embedders.prefixes`.

    Args:
        spec: "MODEL" or "MODEL#REVISION"; a folder or a hub id, and what its files have to be.
    Raises:
        ConfigurationError: the package or the model is missing, or the revision is another one.
    """

    def __init__(self, spec: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigurationError(
                f"the embedder sentence-transformers:{spec} needs a package: "
                "pip install sentence-transformers"
            ) from error
        name, _, wanted = spec.partition("#")
        place = local_folder(name)
        try:
            model = SentenceTransformer(place, device="cpu")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigurationError(not_loaded("sentence-transformers", name, error)) from error
        revision = revision_of(model[0], place)
        if wanted and wanted != revision:
            raise ConfigurationError(
                f"the model {name} has other files ({revision or 'no revision'}) than before "
                f"({wanted})"
            )
        self.key = f"sentence-transformers:{place}" + (f"#{revision}" if revision else "")
        self.max_tokens = int(model.max_seq_length or _COMMON_MAX_TOKENS)
        self._model = model
        self._lock = threading.Lock()
        prefixes = prefixes_of(place)
        prompts: dict[str, str] = model.prompts or {}
        own = [prompts[name] for name in ("document", "passage") if prompts.get(name)]
        self._document_prefix = own[0] if own else prefixes.document
        self._query_prefix = prompts.get("query") or prefixes.query
        self.dimension = int(self._encode(["dimension"], prefix="").shape[1])

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        parts = [self._encode(part, prefix=self._document_prefix) for part in _slices(texts)]
        return np.concatenate(parts)

    def encode_query(self, text: str) -> Vectors:
        vector: Vectors = self._encode([text], prefix=self._query_prefix)[0]
        return vector

    def close(self) -> None:
        """Nothing to do: the model goes with the last reference."""

    def _encode(self, texts: Sequence[str], *, prefix: str) -> Vectors:
        # The tokenizers of transformers change their settings while they encode.
        with self._lock:
            vectors = self._model.encode(
                list(texts),
                prompt=prefix or "",
                batch_size=SLICE_TEXTS,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.asarray(vectors, dtype=np.float32)


class FastEmbedEncoder:
    """A model of FastEmbed's list. Longer texts are cut at the model's own limit.

    Args:
        spec: "NAME", fetched by FastEmbed at first use, or "NAME@FOLDER" with its files.
    Raises:
        ConfigurationError: the package is missing, or the model is unknown or not there.
    """

    max_tokens = _COMMON_MAX_TOKENS

    def __init__(self, spec: str, *, threads: int) -> None:
        try:
            from fastembed import TextEmbedding
        except ImportError as error:
            raise ConfigurationError(
                f"the embedder fastembed:{spec} needs a package: pip install fastembed"
            ) from error
        name, _, folder = spec.partition("@")
        place = local_folder(folder) if folder else None
        try:
            self._model = TextEmbedding(name, threads=threads, specific_model_path=place)
        # FastEmbed raises what onnxruntime and the hub's client raise: no common base.
        except Exception as error:
            raise ConfigurationError(not_loaded("fastembed", name, error)) from error
        self.key = f"fastembed:{name}@{place}" if place else f"fastembed:{name}"
        self._query_prefix, self._document_prefix = prefixes_of(name)
        self._lock = threading.Lock()
        self.dimension = int(self._encode(["dimension"]).shape[1])

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        parts = [
            self._encode([self._document_prefix + text for text in part]) for part in _slices(texts)
        ]
        return np.concatenate(parts)

    def encode_query(self, text: str) -> Vectors:
        vector: Vectors = self._encode([self._query_prefix + text])[0]
        return vector

    def close(self) -> None:
        """Nothing to do: the model goes with the last reference."""

    def _encode(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            return np.stack([*self._model.embed(list(texts))]).astype(np.float32)


def local_folder(name: str) -> str:
    """The whole path of an existing folder, so that a key means the same anywhere; else `name`."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def not_loaded(library: str, name: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{library} could not load the model {name}: {said}. Check the name and the network, or "
        "give the path of a local folder"
    )


def revision_of(transformer: Any, place: str) -> str:
    """What tells the files of a model from others: the hub's commit, or a digest of the folder."""
    config = getattr(getattr(transformer, "auto_model", None), "config", None)
    commit = getattr(config, "_commit_hash", None)
    if isinstance(commit, str):
        return commit[:_DIGEST_CHARS]
    folder = Path(place)
    if not folder.is_dir():
        return ""
    digest = blake3(max_threads=blake3.AUTO)
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".json", ".safetensors", ".bin", ".txt", ".model"} and path.is_file():
            digest.update(str(path.relative_to(folder)).encode())
            digest.update_mmap(path)
    return digest.hexdigest()[:_DIGEST_CHARS]


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), SLICE_TEXTS):
        yield texts[start : start + SLICE_TEXTS]
