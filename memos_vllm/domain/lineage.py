"""The one rule of lineage: nothing stems from itself, over any number of steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


def has_circle(lines: Iterable[tuple[int, int]]) -> bool:
    """Whether following lines from memory to memory can lead back to where it began."""
    targets: dict[int, list[int]] = defaultdict(list)
    pointed_at: dict[int, int] = defaultdict(int)
    for origin, target in lines:
        targets[origin].append(target)
        pointed_at[target] += 1
    free = [origin for origin in targets if pointed_at[origin] == 0]
    while free:
        for target in targets.pop(free.pop(), ()):
            pointed_at[target] -= 1
            if pointed_at[target] == 0:
                free.append(target)
    return any(targets.values())
