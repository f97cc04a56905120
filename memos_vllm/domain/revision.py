"""What became of a document's chunks when it came again."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from memos_vllm.domain.document import NewChunk

# Below this share of common words, what stands between the same neighbours is another text.
_SAME_CHUNK = 0.5
# How many chunks may have gone before one that was edited.
_LOOK_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Revision:
    """Pairs of (old index, new index), and the indexes that have no partner.

    Every old index is in exactly one of `kept`, `edited` and `gone`, every new one in exactly one
    of `kept`, `edited` and `added`.
    """

    kept: tuple[tuple[int, int], ...]
    edited: tuple[tuple[int, int], ...]
    gone: tuple[int, ...]
    added: tuple[int, ...]


def revise(old: Sequence[tuple[str, str]], new: Sequence[NewChunk]) -> Revision:
    """Pair the chunks of a document with those of its newer form; linear in their number.

    Args:
        old: digest as it was read, and text, of each known chunk in order.
        new: the chunks read now, in order.
    Returns:
        `kept` are chunks with equal digests, wherever they moved; `edited` come after the same
        kept chunk and share at least half of their words.
    """
    kept = _same([digest for digest, _ in old], [chunk.digest for chunk in new])
    old_of = {new_index: old_index for old_index, new_index in kept}
    matched = set(old_of.values())
    edited: list[tuple[int, int]] = []
    added: list[int] = []
    following = 0
    for index, chunk in enumerate(new):
        if index in old_of:
            following = old_of[index] + 1
            continue
        partner = _partner(old, matched, following, chunk.text)
        if partner is None:
            added.append(index)
        else:
            matched.add(partner)
            edited.append((partner, index))
            following = partner + 1
    gone = [index for index in range(len(old)) if index not in matched]
    return Revision(tuple(kept), tuple(edited), tuple(gone), tuple(added))


def _same(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Equal digests, the first with the first, the second with the second."""
    places: dict[str, deque[int]] = defaultdict(deque)
    for index, digest in enumerate(old):
        places[digest].append(index)
    return [
        (places[digest].popleft(), index) for index, digest in enumerate(new) if places.get(digest)
    ]


def _partner(
    old: Sequence[tuple[str, str]], matched: set[int], following: int, text: str
) -> int | None:
    """The old chunk that this text is an edit of: one of the next few that have no partner."""
    words = Counter(text.split())
    for index in range(following, min(following + _LOOK_AHEAD, len(old))):
        if index in matched:
            # What comes after a chunk that is still there belongs to that one.
            return None
        if _common(words, Counter(old[index][1].split())) >= _SAME_CHUNK:
            return index
    return None


def _common(one: Counter[str], other: Counter[str]) -> float:
    """The share of words that two texts have in common, 0 to 1."""
    total = one.total() + other.total()
    return 2.0 * (one & other).total() / total if total else 1.0
