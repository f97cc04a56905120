"""What past uses are worth: each is halved every half-life.

That is LRFU (Lee et al., IEEE Transactions on Computers 50, 2001): between "least recently used",
which a short half-life comes close to, and "least frequently used".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from memos_vllm.activation.store.types import PrefixIdentity

HALF_LIFE_SECONDS = 48 * 3600.0
# What went is remembered by name alone; beyond so many names, what went first is forgotten.
GONE_NAMES = 10_000
# More than any use could have earned: a file whose time says so was written by a wrong clock.
_MOST_HALF_LIVES = 24
# How often an artifact's worth is written down, and below which two times are the same.
_WRITE_SECONDS = 60.0
_SAME_SECONDS = 0.01


def rank_after_use(rank: float | None, age: float) -> float:
    """Uses, halved every half-life: as log2(weight) + time, which orders weights of different
    ages without decaying each.

    Args:
        rank: after the use before; None for the first one.
        age: the time now, in half-lives since any fixed moment.
    """
    if rank is None:
        return age
    return age + math.log2(1.0 + 2.0 ** min(rank - age, 1000.0))


class Worth:
    """What the uses of each artifact are worth, as times; no IO.

    An artifact that takes the place of others of its identity, since the memory was edited, takes
    over what their uses were worth: the former text's have no more than a single use.
    One that was evicted is remembered, so that it does not come back as new.

    Args:
        names: most identities that are remembered after their artifacts went.
    """

    def __init__(
        self, *, half_life_seconds: float = HALF_LIFE_SECONDS, names: int = GONE_NAMES
    ) -> None:
        self._half_life = half_life_seconds
        self._names = names
        self._worth: dict[str, float] = {}
        # What is on disk, and when it was written by this process.
        self._seen: dict[str, float] = {}
        self._written_at: dict[str, float] = {}
        self._gone: OrderedDict[PrefixIdentity, float] = OrderedDict()

    def of(self, key: str, *, otherwise: float) -> float:
        """What an artifact is worth; `otherwise` when nothing is known of it."""
        return self._worth.get(key, otherwise)

    def see(self, key: str, worth: float, *, now: float) -> None:
        """What is on disk; it counts when another process wrote it since the last look."""
        if abs(self._seen.get(key, -math.inf) - worth) > _SAME_SECONDS:
            self._seen[key] = worth
            self._worth[key] = min(worth, now + _MOST_HALF_LIVES * self._half_life)

    def due(self, key: str, *, now: float) -> bool:
        """Whether it is time to write an artifact's worth down again."""
        return now - self._written_at.get(key, -math.inf) >= _WRITE_SECONDS

    def wrote(self, key: str, *, now: float) -> None:
        """What an artifact is worth now is on disk."""
        # Another thread may have evicted it meanwhile.
        if (worth := self._worth.get(key)) is not None:
            self._seen[key] = worth
            self._written_at[key] = now

    def use(self, key: str, *, now: float) -> float:
        """Note a use; answers what the artifact is worth from now on."""
        self._worth[key] = worth = self._after_use(self._worth.get(key), now)
        return worth

    def succeed(
        self, key: str, identity: PrefixIdentity, others: Sequence[str], *, now: float
    ) -> None:
        """A new artifact takes the place of `others`, all of one identity."""
        past = [self._worth[other] for other in [key, *others] if other in self._worth]
        if (gone := self._gone.pop(identity, None)) is not None:
            past.append(gone)
        self._worth[key] = self._after_use(max(past, default=None), now)
        for other in others:
            self._worth[other] = min(self._worth.get(other, now), now)

    def forget(self, key: str) -> None:
        """The artifact is not offered any more, for another reason than the budget."""
        for known in (self._worth, self._seen, self._written_at):
            known.pop(key, None)

    def evict(self, key: str, identity: PrefixIdentity) -> None:
        """The artifact went; what it was worth is kept for its next one."""
        worth = self._worth.get(key)
        self.forget(key)
        if worth is not None:
            self._gone[identity] = max(worth, self._gone.pop(identity, worth))
            if len(self._gone) > self._names:
                self._gone.popitem(last=False)

    def forget_scope(self, scope: str) -> None:
        """Nothing of an erased scope is remembered."""
        for identity in [one for one in self._gone if one.scope == scope]:
            del self._gone[identity]

    def _after_use(self, worth: float | None, now: float) -> float:
        rank = None if worth is None else worth / self._half_life
        return rank_after_use(rank, now / self._half_life) * self._half_life
