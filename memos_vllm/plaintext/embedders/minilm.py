"""MiniLM-L6-v2 in ONNX Runtime: the embedder that needs no network and no torch.

Its weights are int8. Where the CPU multiplies int8 without losing anything, each token's states
are rounded to int8 for every product (`models.int8_products`): vectors have a cosine of 0.997 to
those computed in float32, the memories found are the same to the third digit, and a query takes
2.2 ms instead of 3.7, 2.7 instead of 5.6 when other work has used the caches meanwhile. Elsewhere
the weights are widened and products computed in float32.

A text has the same vector whatever is embedded beside it (bit for bit where this was written, and
to 1e-5 in the tests), because padding is masked, and every row of a product is rounded by itself
and summed in the same order. A model that quantises activations by the batch would not do that.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memos_vllm.errors import ConfigurationError
from memos_vllm.plaintext.embedders.base import Vectors

if TYPE_CHECKING:
    import onnxruntime

MINILM_KEY = "minilm-l6-v2-int8"
DIMENSION = 384
# The length of the sentences that the model was trained on. Conversations in shared/data/locomo-dev
# cut into documents of 270, 500 and 700 tokens (medians) had a recall@3 of .50 .49 .54 as the mean
# of such windows, of .50 .45 .53 with windows of 256, of .47 .41 .48 when cut off at 256 tokens and
# of .36 .25 .49 at the 512 that the model accepts (383 questions, +-.025).
WINDOW_TOKENS = 128
# Rows times the longest row. On one core 192 to 768 were equally fast, for texts of 13 and of 50
# tokens; four times as much took a tenth longer, and one text at a time a third.
BATCH_TOKENS = 384
# Of a query, the opening and the close: a pasted document usually stands between them and would
# take seconds.
QUERY_WINDOWS = 2
# Twice what two windows of English need, so that only a part of a long query is tokenized.
_QUERY_EDGE_CHARS = 2_000


class MiniLmEncoder:
    """MiniLM-L6-v2: [n, 384], the mean over tokens.

    A text of more than WINDOW_TOKENS is read in even windows, whose vectors are averaged by their
    numbers of tokens; of a long query only the first and the last window are read.

    Args:
        folder: as prepared: `model.onnx`, `model-int8.onnx` and `tokenizer.json`.
        threads: cores for one call. One is computed on the caller's own thread.
        as_int8: whether products are computed in int8; as the CPU can, when not given.
    Raises:
        ConfigurationError: onnxruntime or tokenizers is missing, or the folder is damaged.
    """

    key = MINILM_KEY
    dimension = DIMENSION
    max_tokens = WINDOW_TOKENS

    def __init__(self, folder: Path, *, threads: int = 1, as_int8: bool | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigurationError(
                f"the embedder {MINILM_KEY} needs the tokenizers package: pip install tokenizers"
            ) from error
        as_int8 = has_exact_int8() if as_int8 is None else as_int8
        self._session = _open_session(
            folder / ("model-int8.onnx" if as_int8 else "model.onnx"), threads
        )
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file asks for rows of exactly 128 tokens.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        start, end = map(self._tokenizer.token_to_id, ("[CLS]", "[SEP]"))
        assert start is not None
        assert end is not None
        self._start, self._end = start, end

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        return self._mean_of_windows([self._windows(text) for text in texts])

    def encode_query(self, text: str) -> Vectors:
        if len(text) > 2 * _QUERY_EDGE_CHARS:
            text = f"{text[:_QUERY_EDGE_CHARS]} {text[-_QUERY_EDGE_CHARS:]}"
        windows = self._windows(text)
        if len(windows) > QUERY_WINDOWS:
            windows = [windows[0], windows[-1]]
        vector: Vectors = self._mean_of_windows([windows])[0]
        return vector

    def close(self) -> None:
        """Nothing to do: the model goes with the last reference."""

    def _windows(self, text: str) -> list[list[int]]:
        """Token ids of a text in windows of even length, each between start and end token."""
        # One by one: a batch would be spread over all cores, which the engine needs.
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = WINDOW_TOKENS - 2
        count = max(1, -(-len(ids) // room))
        bounds = [len(ids) * number // count for number in range(count + 1)]
        return [
            [self._start, *ids[start:end], self._end] for start, end in itertools.pairwise(bounds)
        ]

    def _mean_of_windows(self, windows: Sequence[list[list[int]]]) -> Vectors:
        flat = [window for of_text in windows for window in of_text]
        vectors = self._run(flat) * np.array([[len(window)] for window in flat], np.float32)
        starts = np.cumsum([0, *(len(of_text) for of_text in windows[:-1])])
        mean: Vectors = np.add.reduceat(vectors, starts, axis=0)
        return mean

    def _run(self, windows: Sequence[list[int]]) -> Vectors:
        """[n, 384] of length 1, one row a window."""
        vectors = np.empty((len(windows), DIMENSION), np.float32)
        for batch in _batches([len(window) for window in windows]):
            longest = max(len(windows[place]) for place in batch)
            ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(batch):
                ids[row, : len(windows[place])] = windows[place]
                mask[row, : len(windows[place])] = 1
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(ids),
            }
            states = self._session.run(None, inputs)[0]
            for row, place in enumerate(batch):
                mean = states[row, : len(windows[place])].mean(axis=0)
                vectors[place] = mean / np.linalg.norm(mean)
        return vectors


def has_exact_int8() -> bool:
    """Whether this CPU multiplies int8 fast and adds up without saturating.

    x86 before VNNI adds pairs of products in 16 bits, which clips the largest.
    """
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return True
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(known.split())


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts of about the same length, as many as BATCH_TOKENS allows."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError(
            f"the embedder {MINILM_KEY} needs the onnxruntime package: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads sleep: the engine needs the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(model),
            options,
            providers=["CPUExecutionProvider"],
            # The fused layer norm is slow: without it, everything takes 8 % less time.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    # onnxruntime's own classes of errors share no base but this.
    except Exception as error:
        raise ConfigurationError(
            f"{model} cannot be opened as an ONNX model; remove its folder and run "
            f"`memos-vllm models prepare {MINILM_KEY}`"
        ) from error
