"""What became of the chunks of a document when it is sent again.

A chunk with the same digest is kept, wherever it went. Between kept neighbours, an old chunk and a
new one with much the same words are one memory that was edited. The rest was added, or is gone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

# Half of the words in common, counted on the longer text: a sentence changed in a paragraph leaves
# 0.7 and more, and two paragraphs of one handbook share about 0.2.
_LEAST_SIMILARITY = 0.4
# In a gap an edited chunk lies near its old place; further off it is not looked for.
_REACH = 16

_WORDS = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|\\w+")


class StoredChunk(Protocol):
    """What is read of a chunk: one that was read now, or `KnownChunk`."""

    @property
    def digest(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class KnownChunk:
    """A chunk of the stored document: the digest as it was read, and the text as it is now."""

    digest: str
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One chunk in both versions, by its position in each."""

    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Revision:
    """Every old position is in one of kept, edited and gone; every new one in kept, edited, added.

    Args:
        kept: same text; the position may have changed.
        edited: one memory with another text.
        added, gone: positions, ascending.
    """

    kept: tuple[Pair, ...]
    edited: tuple[Pair, ...]
    added: tuple[int, ...]
    gone: tuple[int, ...]

    @property
    def changes_text(self) -> bool:
        """Whether any text differs; positions of kept chunks may differ without."""
        return bool(self.edited or self.added or self.gone)


def diff_chunks(old: Sequence[StoredChunk], new: Sequence[StoredChunk]) -> Revision:
    """How `new` came from `old`, both in the order of the document. Linear but for sorting."""
    kept = _match_equal(old, new)
    edited = [
        pair
        for old_gap, new_gap in _gaps(kept, len(old), len(new))
        for pair in _match_similar(old, new, old_gap, new_gap)
    ]
    used_old = {pair.old for pair in (*kept, *edited)}
    used_new = {pair.new for pair in (*kept, *edited)}
    return Revision(
        kept=tuple(kept),
        edited=tuple(edited),
        added=tuple(index for index in range(len(new)) if index not in used_new),
        gone=tuple(index for index in range(len(old)) if index not in used_old),
    )


def _match_equal(old: Sequence[StoredChunk], new: Sequence[StoredChunk]) -> list[Pair]:
    """Equal digests, the first with the first; by new position."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for index, chunk in enumerate(old):
        waiting[chunk.digest].append(index)
    return [
        Pair(old=waiting[chunk.digest].popleft(), new=index)
        for index, chunk in enumerate(new)
        if waiting.get(chunk.digest)
    ]


def _gaps(kept: Sequence[Pair], num_old: int, num_new: int) -> Iterator[tuple[range, range]]:
    """Stretches without a kept chunk, in both versions beside the same neighbour.

    Neighbours may have moved apart; then the stretch behind the one before is taken, and if that
    is empty, or taken, the stretch before the one behind.
    """
    old_kept = sorted(pair.old for pair in kept)
    following = dict(zip([-1, *old_kept], [*old_kept, num_old], strict=True))
    preceding = {after: before for before, after in following.items()}
    taken: set[int] = set()
    before = Pair(-1, -1)
    for pair in (*kept, Pair(num_old, num_new)):
        if pair.new > before.new + 1:
            behind = range(before.old + 1, following[before.old])
            ahead = range(preceding[pair.old] + 1, pair.old)
            old_gap = next((gap for gap in (behind, ahead) if gap and gap.start not in taken), None)
            if old_gap is not None:
                taken.add(old_gap.start)
                yield old_gap, range(before.new + 1, pair.new)
        before = pair


def _match_similar(
    old: Sequence[StoredChunk], new: Sequence[StoredChunk], old_gap: range, new_gap: range
) -> Iterator[Pair]:
    """Pairs with much the same words, in order, that have the most in common altogether."""
    if not old_gap or not new_gap:
        return
    old_words = [_words(old[index].text) for index in old_gap]
    new_words = [_words(new[index].text) for index in new_gap]
    # best[i][j]: most in common among the first i and j; only near the diagonal.
    best: list[dict[int, float]] = [defaultdict(float) for _ in range(len(old_words) + 1)]
    scores: dict[tuple[int, int], float] = {}
    for i in range(1, len(old_words) + 1):
        for j in _near(i, len(old_words), len(new_words)):
            score = _similarity(old_words[i - 1], new_words[j - 1])
            matched = best[i - 1][j - 1] + score if score >= _LEAST_SIMILARITY else 0.0
            scores[i, j] = score
            best[i][j] = max(matched, best[i - 1][j], best[i][j - 1])
    yield from reversed(list(_trace(best, scores, old_gap, new_gap)))


def _near(i: int, num_old: int, num_new: int) -> range:
    middle = i * num_new // num_old
    return range(max(1, middle - _REACH), min(num_new, middle + _REACH) + 1)


def _trace(
    best: Sequence[dict[int, float]],
    scores: dict[tuple[int, int], float],
    old_gap: range,
    new_gap: range,
) -> Iterator[Pair]:
    i, j = len(old_gap), len(new_gap)
    while i > 0 and j > 0:
        score = scores.get((i, j), 0.0)
        if score >= _LEAST_SIMILARITY and best[i][j] == best[i - 1][j - 1] + score:
            i, j = i - 1, j - 1
            yield Pair(old_gap[i], new_gap[j])
        elif best[i - 1][j] >= best[i][j - 1]:
            i -= 1
        else:
            j -= 1


def _words(text: str) -> Counter[str]:
    return Counter(_WORDS.findall(text.lower()))


def _similarity(first: Counter[str], second: Counter[str]) -> float:
    """Share of words in common, counted on the longer text; 0 to 1."""
    longer = max(first.total(), second.total())
    return (first & second).total() / longer if longer else 0.0
