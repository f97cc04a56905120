"""The demo's material: the handbook in sections, a call, and questions about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the handbook, stored as one memory."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and a word that a right answer contains (compared without case)."""

    question: str
    expected: str

    def answered_by(self, answer: str) -> bool:
        return self.expected.casefold() in answer.casefold()


def handbook_text() -> str:
    return _resource("handbook.md")


def handbook_sections() -> list[Section]:
    """The handbook cut at its `## ` headings; what stands before the first is left out."""
    _, *sections = ("\n" + handbook_text()).split("\n## ")
    return [Section(title.strip(), text.strip()) for title, _, text in map(_cut_title, sections)]


def demo_questions() -> list[Question]:
    return [Question(**entry) for entry in json.loads(_resource("questions.json"))]


def demo_calls() -> list[dict[str, str]]:
    """The turns of a call with a customer, as `Cube.add_turns` takes them."""
    turns: list[dict[str, str]] = json.loads(_resource("calls.json"))["turns"]
    return turns


def demo_call_question() -> Question:
    """What someone wants to know of that call."""
    return Question(**json.loads(_resource("calls.json"))["question"])


def _cut_title(section: str) -> tuple[str, str, str]:
    return section.partition("\n")


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
