"""The rows of the table: who is asked, in which state, and what a sample of it must show."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

# The last words of a memory's block are in no head; how many tokens they have at most.
_END_MARKER_TOKENS = 8


class Server(StrEnum):
    """A server that takes part. Each has its own process and block pool, of the same size."""

    PLAIN = "plain"
    MEMOS = "memos"
    MEMOS_INT8 = "memos-int8"
    MEMOS_INT4 = "memos-int4"
    LMCACHE = "lmcache"
    EXAMPLE_CONNECTOR = "example-connector"

    @property
    def has_cubes(self) -> bool:
        return self in {Server.MEMOS, Server.MEMOS_INT8, Server.MEMOS_INT4}


class State(Enum):
    """What happened to the memory before it is asked about."""

    ABSENT = "the prompt has no memory"
    UNSEEN = "nothing of the prompt was computed before"
    WARM = "the same memory was asked about just before"
    FLOODED = "other prompts have filled the block pool since"
    NOT_RESIDENT = "the block pool was emptied; what was written out is there"
    RESTARTED = "a new server process, the machine's page cache warm"
    RESTARTED_COLD = "a new server process, the artifacts dropped from the page cache"


class Answers(Enum):
    """How the answers compare with a prefill's."""

    REFERENCE = "are plain vLLM's own"
    EXACT = "differ from it at near-ties, and no more often than plain vLLM from itself"
    INT8 = "are approximate: 8 bits a number"
    INT4 = "are approximate: 4 bits a number"


@dataclass(frozen=True, slots=True)
class Situation:
    """One row.

    Attributes:
        source: what the connector must report; "" where none is asked.
        cached: whether the memory's blocks must have been reused, or must not.
        whole_prompts: only a question that was asked before is found, so it is asked again.
    """

    name: str
    server: Server
    state: State
    cached: bool
    source: str = ""
    answers: Answers = Answers.REFERENCE
    whole_prompts: bool = False

    @property
    def restarts(self) -> bool:
        return self.state in {State.RESTARTED, State.RESTARTED_COLD}


NO_MEMORY = Situation("no-memory", Server.PLAIN, State.ABSENT, cached=False)
DIRECT = Situation("direct", Server.PLAIN, State.UNSEEN, cached=False)
APC_WARM = Situation("apc-warm", Server.PLAIN, State.WARM, cached=True)
APC_FLOODED = Situation("apc-flooded", Server.PLAIN, State.FLOODED, cached=False)

_EXACT = Answers.EXACT
SITUATIONS = (
    NO_MEMORY,
    DIRECT,
    APC_WARM,
    APC_FLOODED,
    Situation("memos-resident", Server.MEMOS, State.WARM, True, "resident", _EXACT),
    Situation("memos-flooded", Server.MEMOS, State.FLOODED, True, "resident", _EXACT),
    Situation("memos-store", Server.MEMOS, State.NOT_RESIDENT, True, "store", _EXACT),
    Situation("memos-restart", Server.MEMOS, State.RESTARTED, True, "store", _EXACT),
    Situation("memos-restart-cold", Server.MEMOS, State.RESTARTED_COLD, True, "store", _EXACT),
    Situation("memos-int8", Server.MEMOS_INT8, State.NOT_RESIDENT, True, "store", Answers.INT8),
    Situation("memos-int4", Server.MEMOS_INT4, State.NOT_RESIDENT, True, "store", Answers.INT4),
    Situation("lmcache", Server.LMCACHE, State.NOT_RESIDENT, True, answers=_EXACT),
    Situation(
        "example-connector",
        Server.EXAMPLE_CONNECTOR,
        State.NOT_RESIDENT,
        True,
        answers=_EXACT,
        whole_prompts=True,
    ),
)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
QUICK = (
    *("no-memory", "direct", "apc-warm", "apc-flooded"),
    *("memos-resident", "memos-flooded", "memos-store"),
)


def fault_of(
    situation: Situation,
    *,
    memory_tokens: int,
    prompt_tokens: int,
    query_tokens: int,
    cached_tokens: int,
    source: str,
    block_tokens: int,
) -> str:
    """Why a sample does not show what its row claims; "" when it does.

    Args:
        memory_tokens: of the memory's block, which stands behind a short head of the template.
        query_tokens: of what was asked after it.
        block_tokens: of one KV block; only whole blocks are reused.
    """
    if situation.source and source != situation.source:
        return f"the connector says '{source}', not '{situation.source}'"
    least = (memory_tokens - _END_MARKER_TOKENS) // block_tokens * block_tokens
    if situation.cached and cached_tokens < least:
        return f"only {cached_tokens} tokens were reused, not {least}"
    most = prompt_tokens - query_tokens if situation.cached else block_tokens
    if situation.whole_prompts:
        most = prompt_tokens
    if cached_tokens > most:
        return f"{cached_tokens} tokens were reused, at most {most} should have been"
    return ""
