"""Memories and questions of given lengths, in the tokens of the model that is measured.

Memory is plain sentences that a seed draws, so that each length is another text. A question opens
with random letters, which no cache has seen.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from memos_vllm.activation.prefix import compose_messages, render_memory_block
from memos_vllm.activation.templates import load_template, probe_template
from memos_vllm.errors import ConfigurationError

_PLACES = ("Arvika", "Belmont", "Corran", "Dunmore", "Elsworth", "Farrow", "Glenholm", "Hartwell")
_THINGS = ("ferry", "library", "museum", "workshop", "bakery", "garden", "theatre", "archive")
_PEOPLE = ("Ada", "Bruno", "Clara", "Dmitri", "Edith", "Femi", "Greta", "Hugo", "Ines", "Jonas")
_FORMS = (
    "The {thing} of {place} opens at {hour}:{minute} and closes after {count} visitors.",
    "{person} looks after the {thing} in {place} and has done so for {count} years.",
    "A ticket for the {thing} in {place} costs {count} crowns, and {person} sells it.",
    "In {place} nobody may enter the {thing} before {hour}:{minute} without asking {person}.",
    "{person} wrote {count} letters about the {thing} that {place} lost in a storm.",
)
_SENTENCES_A_NOTE = 4
# The end marker, which no head includes, has five or so.
_MARGIN_TOKENS = 8
_ASKED = "What does the first note say? Answer in a few words."
PROBES = (
    "Which place does the first note speak of?",
    "Who looks after something, and where?",
    "What does a ticket cost?",
    "When does something open in the morning?",
    "Name two people from the notes.",
    "Write one sentence about the last note.",
)


@dataclass(frozen=True, slots=True)
class Note:
    """One memory of the cube, as the renderer reads it."""

    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a cube holds.

    Attributes:
        block: the text that memory puts at the head of the prompt.
        num_tokens: of the block.
    """

    notes: tuple[Note, ...]
    block: str
    num_tokens: int


class Prompts:
    """Writes prompts for one model.

    Args:
        folder: the model's, with tokenizer.json and the chat template.
        seed: decides every text.
    Raises:
        ConfigurationError: tokenizer.json cannot be read.
        TemplateError: there is no chat template.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self._traits = probe_template(load_template(folder))
        self._seed = seed
        self._random = random.Random(seed)

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def memory(self, num_tokens: int, *, variant: int = 0) -> Memory:
        """The shortest memory of whole sentences whose block has so many tokens and a few more.

        The few make every row reuse the same number of whole blocks: plain vLLM reuses what
        stands between memory and question as well, some 30 tokens of the template.

        Args:
            variant: tells memories of the same length apart.
        """
        drawn = random.Random(f"{self._seed} {num_tokens} {variant}")
        sentences: list[str] = []
        memory = self._rendered(sentences)
        while memory.num_tokens < num_tokens + _MARGIN_TOKENS:
            sentences.append(_sentence(drawn))
            memory = self._rendered(sentences)
        return memory

    def filler(self, words: int) -> str:
        """Words that no cache has seen."""
        letters = string.ascii_lowercase
        return " ".join("".join(self._random.choices(letters, k=6)) for _ in range(words))

    def question(self, num_tokens: int) -> list[dict[str, Any]]:
        """A new question of about so many tokens, and never the same again."""
        words = self.filler(num_tokens)
        ids = self._tokenizer.encode(words, add_special_tokens=False).ids
        left = max(4, num_tokens - self.count(_ASKED))
        opening = self._tokenizer.decode(ids[:left])
        return [{"role": "user", "content": f"{opening}. {_ASKED}"}]

    def salt(self) -> str:
        """A cache salt under which nothing has been computed yet."""
        return self.filler(4).replace(" ", "")

    def with_memory(
        self, messages: Sequence[dict[str, Any]], memory: Memory
    ) -> list[dict[str, Any]]:
        """The very messages that memory composes, for a server that has none."""
        return compose_messages(
            messages,
            block=memory.block,
            default_system=self._traits.default_system,
            placement=self._traits.placement,
        )

    def _rendered(self, sentences: Sequence[str]) -> Memory:
        notes = tuple(
            Note("\n".join(sentences[start : start + _SENTENCES_A_NOTE]))
            for start in range(0, len(sentences), _SENTENCES_A_NOTE)
        )
        block = render_memory_block(None, notes)
        return Memory(notes, block, self.count(block))


def _sentence(drawn: random.Random) -> str:
    return drawn.choice(_FORMS).format(
        thing=drawn.choice(_THINGS),
        place=drawn.choice(_PLACES),
        person=drawn.choice(_PEOPLE),
        hour=drawn.randint(5, 22),
        minute=f"{drawn.randint(0, 59):02}",
        count=drawn.randint(2, 900),
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}; the benchmark counts tokens with it"
        ) from error
