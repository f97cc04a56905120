"""Waits until the engine's block pool keeps nothing of what was erased."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.sampling_params import SamplingParams

from memos_vllm.engine.stats import latest_reports
from memos_vllm.errors import Unavailable

# The engine looks at the store, and reports, at most once a second, and only while it works.
_STEP_SECONDS = 1.05
# One to look at the store, one to drop what was erased there, one to report it.
_FEWEST_STEPS = 3
_MOST_STEPS = 30


class PoolWatch:
    """The block pool of a running engine, through what its scheduler half reports.

    Args:
        reports: whether this server's engine reports what is resident.
    """

    def __init__(self, engine: EngineClient, *, reports: bool) -> None:
        self._engine = engine
        self._reports = reports

    async def drop(self, scopes: Sequence[str]) -> str:
        """See `eraser.Residency`."""
        for step in range(1, _MOST_STEPS + 1):
            await self._step()
            await asyncio.sleep(_STEP_SECONDS)
            if step >= _FEWEST_STEPS and not _resident(scopes):
                break
        else:
            raise Unavailable("the engine still reports blocks of what was erased")
        if not self._reports:
            return (
                "this engine was started without statistics and does not report which blocks it "
                "keeps"
            )
        return (
            "the engine has looked at the erased scopes and reports none of their blocks as kept; "
            "bytes of blocks that were let go, and of chats over several cubes, stay in its memory "
            "until others are written over them"
        )

    async def _step(self) -> None:
        """Have an engine that may be idle do a step: it drops blocks while it works."""
        # A block has more than one token, so this leaves nothing in the prefix cache.
        outputs = self._engine.generate(
            tokens_input([0]),
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
            f"memos-erase-{uuid.uuid4().hex}",
        )
        async for _ in outputs:
            pass


def _resident(scopes: Sequence[str]) -> bool:
    return any(
        report.get("scopes", {}).get(scope, 0)
        for report in latest_reports.values()
        for scope in scopes
    )
