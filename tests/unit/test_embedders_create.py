"""Settings of embedders, the contract that all of them keep, and what the cache may keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from model_server import running_server
from tiny_bert import write_bert

from memos_vllm.errors import ConfigurationError, Conflict, Unavailable
from memos_vllm.plaintext.embedders import (
    DEFAULT_EMBEDDER,
    CachedEmbedder,
    Embedder,
    Vectors,
    create_embedder,
)
from memos_vllm.plaintext.embedders.prefixes import prefixes_of

Open = Callable[[], Embedder]


class CountingEncoder:
    """A model that answers the lengths of texts, and counts."""

    key = "counting"
    dimension = 2
    max_tokens = 100

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Vectors | None = None

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        if self.answer is not None:
            return self.answer
        return np.array([[len(text), 1] for text in texts], np.float32)

    def encode_query(self, text: str) -> Vectors:
        vector: Vectors = self.encode_documents([text])[0]
        return vector

    def close(self) -> None:
        pass


@pytest.fixture(params=["minilm", "openai", "sentence-transformers", "fastembed"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens an embedder of each kind, for the contract."""

    def opening(spec: str) -> Open:
        def again() -> Embedder:
            opened = create_embedder(spec)
            assert opened is not None
            return opened

        return again

    if request.param == "minilm":
        yield opening(DEFAULT_EMBEDDER)
    elif request.param == "openai":
        with running_server() as server:
            yield opening(f"openai:tiny@{server.url}/v1")
    elif request.param == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
        yield opening(f"sentence-transformers:{write_bert(tmp_path / 'tiny')}")
    else:
        pytest.importorskip("fastembed")
        from memos_vllm.models.prepare import prepare

        folder = tmp_path / "minilm"
        write_bert(folder)
        for name in ("model.onnx", "tokenizer.json"):
            (folder / name).write_bytes((prepare(DEFAULT_EMBEDDER) / name).read_bytes())
        yield opening(f"fastembed:sentence-transformers/all-MiniLM-L6-v2@{folder}")


def test_every_embedder_keeps_the_contract(open_again: Open) -> None:
    embedder = open_again()
    texts = ["a grey cat", "the river in winter " * 40, "a grey cat", "bread"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (4, embedder.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors[0] == vectors[2]).all()
    np.testing.assert_allclose(embedder.embed(texts[1:2])[0], vectors[1], atol=1e-5)
    query = embedder.embed_query("a grey cat")
    assert query.shape == (embedder.dimension,)
    assert query is embedder.embed_query("a grey cat")
    assert embedder.max_tokens > 0
    again = create_embedder(embedder.key)
    assert again is not None
    assert (again.key, again.dimension) == (embedder.key, embedder.dimension)
    np.testing.assert_allclose(again.embed_query("a grey cat"), query, atol=1e-5)
    again.close()
    embedder.close()


def test_a_query_is_computed_once_and_cannot_be_changed_by_who_gets_it() -> None:
    encoder = CountingEncoder()
    embedder = CachedEmbedder(encoder)
    first = embedder.embed_query("hello")
    embedder.embed_query("hello")
    assert encoder.asked == ["hello"]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    other = CachedEmbedder(CountingEncoder())
    assert other.embed_query("hello") is not first


def test_the_cache_of_queries_is_bounded() -> None:
    encoder = CountingEncoder()
    embedder = CachedEmbedder(encoder, cached_queries=2)
    for text in ("a", "b", "c", "a"):
        embedder.embed_query(text)
    assert encoder.asked == ["a", "b", "c", "a"]


def test_vectors_that_changed_their_dimension_are_refused_and_both_are_named() -> None:
    encoder = CountingEncoder()
    embedder = CachedEmbedder(encoder)
    encoder.answer = np.ones((1, 3), np.float32)
    with pytest.raises(Conflict, match=r"3 dimensions.* 2 before"):
        embedder.embed(["hello"])


@pytest.mark.parametrize("answer", [[[1, np.nan]], [[np.inf, 1]], [[1, 1], [1, 1]]])
def test_nonsense_from_a_model_is_never_a_vector(answer: list[list[float]]) -> None:
    encoder = CountingEncoder()
    encoder.answer = np.array(answer, np.float32)
    with pytest.raises(Unavailable):
        CachedEmbedder(encoder).embed(["hello"])


def test_a_vector_without_a_direction_stays_zero() -> None:
    encoder = CountingEncoder()
    encoder.answer = np.zeros((1, 2), np.float32)
    assert (CachedEmbedder(encoder).embed(["hello"]) == 0).all()


def test_none_means_no_vectors() -> None:
    assert create_embedder("none") is None


@pytest.mark.parametrize("spec", ["", "minilm", "openai:", "word2vec:x", "sentence-transformers"])
def test_an_unknown_setting_lists_what_may_be_set(spec: str) -> None:
    with pytest.raises(ConfigurationError, match=r"minilm-l6-v2-int8, sentence-transformers:MODEL"):
        create_embedder(spec)


@pytest.mark.parametrize("package", ["sentence-transformers", "fastembed"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ConfigurationError, match=f"pip install {package}"):
        create_embedder(f"{package}:some/model")


def test_a_model_whose_files_changed_does_not_open_under_its_old_key(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = write_bert(tmp_path / "tiny")
    former = create_embedder(f"sentence-transformers:{folder}")
    write_bert(folder, seed=1)
    renewed = create_embedder(f"sentence-transformers:{folder}")
    assert former is not None
    assert renewed is not None
    assert former.key != renewed.key
    with pytest.raises(ConfigurationError, match="other files"):
        create_embedder(former.key)


@pytest.mark.parametrize("kind", ["sentence-transformers", "fastembed"])
def test_a_model_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(kind.replace("-", "_"))
    with pytest.raises(ConfigurationError, match=f"could not load the model {tmp_path}"):
        create_embedder(f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("model", "query", "document"),
    [
        ("intfloat/multilingual-e5-large", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "Instruct: ", ""),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence", ""),
        ("BAAI/bge-m3", "", ""),
        ("/models/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", ""),
        ("Snowflake/snowflake-arctic-embed-m", "Represent this sentence", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "Instruct: ", ""),
        ("sentence-transformers/all-MiniLM-L6-v2", "", ""),
        ("text-embedding-3-small", "", ""),
    ],
)
def test_known_families_have_their_prefixes(model: str, query: str, document: str) -> None:
    found = prefixes_of(model)
    assert found.query.startswith(query)
    assert bool(found.query) == bool(query)
    assert found.document == document


def test_importing_the_embedders_loads_none_of_the_libraries_behind_them() -> None:
    code = (
        "import sys, memos_vllm.plaintext.embedders, memos_vllm.plaintext.rerankers\n"
        "heavy = {'onnxruntime', 'tokenizers', 'torch', 'sentence_transformers', 'fastembed'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
