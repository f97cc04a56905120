"""Whether a row's answers may count: the yardstick of the exactness tests, in the same run."""

from __future__ import annotations

from collections.abc import Iterator

from memos_vllm.bench.fleet import Fleet
from memos_vllm.bench.measure import Rounds
from memos_vllm.bench.plan import Plan
from memos_vllm.bench.prompts import PROBES
from memos_vllm.bench.record import Cell, Verdict
from memos_vllm.bench.situations import DIRECT, Answers, Server, Situation
from memos_vllm.bench.yardstick import (
    Answer,
    Asker,
    Chat,
    Comparison,
    Yardstick,
    chance_of,
    compare,
    measure,
)
from memos_vllm.errors import MemosError

_ANSWER_TOKENS = 24
# Below this, as many differences do not come from the noise that plain vLLM shows.
_CHANCE = 0.01
# What an encoding may move the two likeliest tokens against each other, in nats, beside the noise;
# a page in a wrong place moves them by whole nats.
_APPROXIMATE_GAP = {Answers.INT8: 0.25, Answers.INT4: 1.0}


def judge(fleet: Fleet, plan: Plan, rounds: Rounds, *, memory_tokens: int) -> Iterator[Verdict]:
    """Compare each row's answers to a few questions with those of plain vLLM."""
    reference = rounds.prepare(DIRECT, Cell(memory_tokens, 0))
    questions = [[{"role": "user", "content": text}] for text in PROBES]
    asker = Asker(fleet.client(Server.PLAIN), max_tokens=_ANSWER_TOKENS)
    yardstick, runs = measure(asker, [rounds.messages(reference, one) for one in questions])
    for situation in plan.compared:
        try:
            answers = _answers(fleet, rounds, situation, memory_tokens, questions)
            found = compare(answers, runs["warm"])
        except (MemosError, ValueError) as error:
            yield _failed(situation, memory_tokens, yardstick, str(error))
            continue
        yield Verdict(
            situation=situation.name,
            memory_tokens=memory_tokens,
            prompts=found.num_prompts,
            differing=len(found.differences),
            gap=found.gap,
            shift=found.shift,
            noise=str(yardstick.noise),
            fault=fault_of_answers(situation.answers, found, yardstick.noise),
        )


def fault_of_answers(answers: Answers, found: Comparison, noise: Comparison) -> str:
    """Why answers do not count; "" when they do."""
    allowed = noise.shift + _APPROXIMATE_GAP.get(answers, 0.0)
    if found.gap > allowed:
        return f"answers part at a gap of {found.gap:.3g} nats, at most {allowed:.3g} is noise"
    if answers is Answers.EXACT and found.differences:
        chance = chance_of(len(found.differences), found.num_prompts, noise=noise)
        if chance < _CHANCE:
            return (
                f"{len(found.differences)} of {found.num_prompts} answers differ, plain vLLM's "
                f"own {len(noise.differences)} of {noise.num_prompts}"
            )
    return ""


def _answers(
    fleet: Fleet,
    rounds: Rounds,
    situation: Situation,
    memory_tokens: int,
    questions: list[list[dict[str, str]]],
) -> list[Answer]:
    asking = rounds.prepare(situation, Cell(memory_tokens, 0))
    # Only now: a server that was started anew has another client.
    asker = Asker(fleet.client(situation.server), max_tokens=_ANSWER_TOKENS)
    chats = [Chat(rounds.messages(asking, one), asking.body) for one in questions]
    if situation.whole_prompts:
        asker.ask_each(chats)
        fleet.empty_pool(situation.server)
    return asker.ask_each(chats)


def _failed(situation: Situation, memory_tokens: int, yardstick: Yardstick, reason: str) -> Verdict:
    noise = str(yardstick.noise)
    return Verdict(situation.name, memory_tokens, len(PROBES), 0, 0.0, 0.0, noise, reason)
