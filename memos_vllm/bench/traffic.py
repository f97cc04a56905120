"""Chats to measure with, drawn from a seed."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memos_vllm.errors import InvalidRequest

Message = Mapping[str, str]
# What the model is asked behind the filler; the answer's length is fixed, so any will do.
_ASKED = "what is the motto?"


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `cube` is None when it is asked without memory."""

    cube: str | None
    text: str


@dataclass(frozen=True, slots=True)
class PlannedChat:
    """One chat to send.

    Attributes:
        output_tokens: exactly so many are generated.
        body: fields of the request body beside the usual ones.
        cube: whose memory the chat uses, in whatever way; None for plain traffic.
    """

    messages: tuple[Message, ...]
    output_tokens: int
    body: Mapping[str, object] = field(default_factory=dict)
    cube: str | None = None


class Filler:
    """Random words, none of them twice, so that no prefix cache has seen a text of them."""

    def __init__(self, seed: int, purpose: str) -> None:
        # The purpose keeps two fillers of one run apart.
        self._random = random.Random(f"{seed}/{purpose}")
        self._used: set[str] = set()

    def words(self, number: int) -> str:
        """About four tokens a word."""
        return " ".join(self._word() for _ in range(number))

    def _word(self) -> str:
        while (word := "".join(self._random.choices(string.ascii_lowercase, k=6))) in self._used:
            pass
        self._used.add(word)
        return word


def zipf_weights(number: int, exponent: float = 1.0) -> list[float]:
    """The shares of `number` things, the first one the most asked for: 1 / rank ** exponent."""
    raw = [1 / rank**exponent for rank in range(1, number + 1)]
    return [weight / sum(raw) for weight in raw]


def draw_questions(
    cubes: Sequence[str],
    *,
    number: int,
    seed: int,
    exponent: float = 1.0,
    plain_share: float = 0.0,
    filler_words: int = 6,
) -> tuple[Question, ...]:
    """Questions over a Zipf mix of cubes, the same for the same seed.

    Args:
        cubes: the most asked for first.
        plain_share: of the questions, about so many are asked without memory.
        filler_words: with which each question begins, before what is asked.
    Raises:
        InvalidRequest: there is nothing to ask.
    """
    if number < 1 or (not cubes and plain_share < 1):
        raise InvalidRequest("load needs at least one question and one cube to ask")
    chance = random.Random(f"{seed}/cubes")
    weights = zipf_weights(len(cubes), exponent)
    filler = Filler(seed, "questions")

    def draw() -> Iterator[Question]:
        for _ in range(number):
            plain = chance.random() < plain_share
            cube = None if plain else chance.choices(cubes, weights)[0]
            yield Question(cube, f"Regarding {filler.words(filler_words)}: {_ASKED}")

    return tuple(draw())


def asking_cubes(questions: Sequence[Question], *, output_tokens: int) -> tuple[PlannedChat, ...]:
    """Each question with its cube named in the body."""
    return tuple(
        PlannedChat(
            messages=_as_user(question),
            output_tokens=output_tokens,
            body={} if question.cube is None else {"memcube_id": question.cube},
            cube=question.cube,
        )
        for question in questions
    )


def asking_by_prompt(
    questions: Sequence[Question],
    compose: Callable[[Question], Sequence[Message]],
    *,
    output_tokens: int,
) -> tuple[PlannedChat, ...]:
    """Each question for a server without memory: `compose` writes the cube's text into the prompt.

    A question without memory is sent as it is.
    """
    return tuple(
        PlannedChat(
            messages=_as_user(question) if question.cube is None else tuple(compose(question)),
            output_tokens=output_tokens,
            cube=question.cube,
        )
        for question in questions
    )


def _as_user(question: Question) -> tuple[Message, ...]:
    return ({"role": "user", "content": question.text},)
