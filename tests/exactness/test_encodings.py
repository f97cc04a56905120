"""Encoded memories answer as the exact ones do: SmolLM2, five memories, fifty questions.

The KV of every memory is bfloat16, as in vLLM's pages, but the model computes in float32, so that
nothing but the encoding parts two distributions. Arithmetic in bfloat16 hides what int8 changes:
one number in a thousand moved by its last bit shifts the answers as far. That is measured too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from memos_vllm.activation.prefix import (
    compose_messages,
    head_of,
    probe_messages,
    render_memory_block,
)
from memos_vllm.demo.handbook import handbook_sections
from memos_vllm_kernels.encoding import Encoding, decode, encode

MEMORY_TOKENS = 1500

# By the section of the handbook that a memory begins with; it goes on until it is long enough.
QUESTIONS = {
    0: (
        "Who founded the company, and when?",
        "Which lantern floats on water?",
        "How much does the Heron cost?",
        "How long does the battery of the Owl last?",
        "Does the warranty cover a lantern that I painted myself?",
        "A customer is angry. What should I do first?",
        "List what the handbook says about shipping.",
        "May I keep holidays for the next year?",
        "I found a mistake in my pay. Whom do I ask?",
        "Which meeting room has room for twenty people?",
    ),
    6: (
        "Within how many days can a lantern be sent back?",
        "Where is the warehouse?",
        "Which day do people work at home?",
        "Who is the company nurse?",
        "When are salaries paid?",
        "I will travel for five hours. Train or van?",
        "What is for lunch on Friday?",
        "Why should nobody wear a scarf near the ovens?",
        "I lost my laptop. What now?",
        "Write two sentences about the customer team.",
    ),
    12: (
        "How much may a hotel cost?",
        "On which floor is the library?",
        "Whose cup has a red stripe?",
        "How hot are the ovens?",
        "For how long can a deleted file be brought back?",
        "Who leads the hiring of new people?",
        "What do I build on my first day?",
        "Summarise what employees may do for others.",
        "Name the person in charge of buying.",
        "How is a lantern tested before it is packed?",
    ),
    18: (
        "How long does a new employee have a buddy?",
        "How much money is there for courses and books?",
        "Where does our steel come from?",
        "What happens to a lantern that fails its test?",
        "When does the night shift end?",
        "Can I buy the oldest lantern in the shop?",
        "Who reads every text before it is printed?",
        "Tell me about the clubs.",
        "What does a lost key cost?",
        "Describe the office dog.",
    ),
    24: (
        "When do school classes come to the shop?",
        "What do I get for finding a mistake in the handbook?",
        "Where does the chess club meet?",
        "Who owns the bees?",
        "What colour is the badge of a visitor?",
        "Is smoking allowed in the building?",
        "What does Biscuit never eat?",
        "Give three facts that everybody asks for.",
        "In which year was there a flood?",
        "What does a spare battery cost?",
    ),
}

NUDGED = "one number in 1,000 moved by its last bit"
ROWS = (*(encoding.value for encoding in Encoding), NUDGED)

Note = Callable[[str], None]
Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Memory:
    """A memory as a server keeps it, and what each question adds to its tokens.

    Attributes:
        layers: keys after RoPE and values, bfloat16 [tokens, kv_heads, head_dim].
    """

    layers: Layers
    suffixes: list[list[int]]


@dataclass(frozen=True)
class Shift:
    """How far one row of `ROWS` is from exact KV.

    Attributes:
        divergences: KL(exact || row) of the next token in nats, one for each question.
        kept: whether the likeliest token stayed.
    """

    divergences: list[float]
    kept: list[bool]

    @property
    def mean(self) -> float:
        return sum(self.divergences) / len(self.divergences)

    @property
    def share_kept(self) -> float:
        return sum(self.kept) / len(self.kept)


Shifts = dict[str, Shift]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def memories(model: Any, model_folder: Path) -> list[Memory]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [prefill(model, tokenizer, first, asked) for first, asked in QUESTIONS.items()]


@pytest.fixture(scope="module")
def shifts(model: Any, memories: list[Memory]) -> Shifts:
    return measure(model, memories)


@pytest.fixture(scope="module")
def served(model_folder: Path, memories: list[Memory]) -> Shifts:
    """The same with all arithmetic in bfloat16, as a server computes."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    return measure(model, memories)


@torch.inference_mode()
def prefill(model: Any, tokenizer: Any, first: int, questions: tuple[str, ...]) -> Memory:
    block, head = shortest_block(tokenizer, first)
    cache = DynamicCache()
    model(torch.tensor([head]), past_key_values=cache, logits_to_keep=1)
    layers = [(page_rows(keys), page_rows(values)) for keys, values, _ in cache]
    suffixes = []
    for question in questions:
        messages = compose_messages([{"role": "user", "content": question}], block=block)
        prompt = tokens_of(tokenizer, messages)
        assert prompt[: len(head)] == head
        suffixes.append(prompt[len(head) :])
    return Memory(layers, suffixes)


def shortest_block(tokenizer: Any, first: int) -> tuple[str, list[int]]:
    """As few sections as give a memory of 1,500 tokens, and the tokens that an artifact holds."""
    sections = handbook_sections()
    sections = sections[first:] + sections[:first]
    for count in range(1, len(sections)):
        block = render_memory_block(None, sections[:count])
        head = head_of(*(tokens_of(tokenizer, probe) for probe in probe_messages(block)))
        if len(head) >= MEMORY_TOKENS:
            return block, head
    raise AssertionError("the handbook is too short")


def tokens_of(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


def page_rows(cached: torch.Tensor) -> torch.Tensor:
    """[1, kv_heads, tokens, head_dim] as the bfloat16 rows of a page."""
    return cached[0].transpose(0, 1).to(torch.bfloat16)


@torch.inference_mode()
def measure(model: Any, memories: list[Memory]) -> Shifts:
    """Ask every question on top of all rows at once: one batch, which has the exact KV first."""
    found = {row: Shift([], []) for row in ROWS}
    for memory in memories:
        layers = [
            (variants(keys).to(model.dtype), variants(values).to(model.dtype))
            for keys, values in memory.layers
        ]
        for suffix in memory.suffixes:
            ids = torch.tensor([suffix] * len(ROWS))
            # A cache of its own: the model appends to it.
            output = model(ids, past_key_values=DynamicCache(layers), logits_to_keep=1)
            log_chances = output.logits[:, -1].double().log_softmax(-1)
            exact = log_chances[0]
            for row, log_chance in zip(ROWS, log_chances, strict=True):
                divergence = (exact.exp() * (exact - log_chance)).sum()
                found[row].divergences.append(divergence.item())
                found[row].kept.append(bool(log_chance.argmax() == exact.argmax()))
    return found


def variants(tokens: torch.Tensor) -> torch.Tensor:
    """One layer's keys or values as each of `ROWS` has them: [rows, kv_heads, tokens, head_dim]."""
    decoded = [
        decode(encode(tokens, encoding), encoding, head_dim=tokens.shape[-1], dtype=torch.bfloat16)
        for encoding in Encoding
    ]
    return torch.stack([*decoded, nudged(tokens)]).transpose(1, 2).contiguous()


def nudged(tokens: torch.Tensor) -> torch.Tensor:
    chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.001
    return (tokens.view(torch.int16) ^ chosen.to(torch.int16)).view(torch.bfloat16)


def table(shifts: Shifts, served: Shifts, *, head_dim: int) -> str:
    """What both arithmetics gave, as a Markdown table; bytes are those of a row of one head."""
    lines = [
        "| KV as | bytes | mean KL, nats | largest KL | same first token | "
        "bfloat16 arithmetic: mean KL | same first token |",
        "|---|---|---|---|---|---|---|",
    ]
    encoded = {encoding.value: encoding for encoding in Encoding}
    for row in ROWS[1:]:
        encoding = encoded.get(row, Encoding.EXACT)
        shift, rounded = shifts[row], served[row]
        lines.append(
            f"| {row} | {encoding.row_bytes(head_dim, dtype=torch.bfloat16)} | {shift.mean:.2g} | "
            f"{max(shift.divergences):.2g} | {sum(shift.kept)} of {len(shift.kept)} | "
            f"{rounded.mean:.2g} | {sum(rounded.kept)} of {len(rounded.kept)} |"
        )
    return "\n".join(lines)


def test_the_memories_have_1500_tokens_and_50_questions(memories: list[Memory]) -> None:
    assert all(len(memory.layers[0][0]) >= MEMORY_TOKENS for memory in memories)
    assert len({question for asked in QUESTIONS.values() for question in asked}) == 50


@pytest.mark.parametrize(
    ("encoding", "largest_mean", "smallest_share"),
    [
        (Encoding.INT8, 0.001, 0.99),
        (Encoding.FP8, 0.001, 0.96),
        (Encoding.INT4, 0.01, 0.96),
    ],
)
def test_encoded_memory_answers_as_the_exact_one_does(
    encoding: Encoding, largest_mean: float, smallest_share: float, shifts: Shifts
) -> None:
    shift = shifts[encoding.value]
    # Zero would be a cache that nobody encoded.
    assert 0 < shift.mean < largest_mean
    assert shift.share_kept >= smallest_share


def test_in_bfloat16_arithmetic_int8_is_lost_in_the_rounding(
    model: Any, shifts: Shifts, served: Shifts, note: Note
) -> None:
    """No further from exact KV than the nudge, but for the luck of fifty draws."""
    note(table(shifts, served, head_dim=model.config.head_dim))
    assert served[Encoding.INT8.value].mean < 1.5 * served[NUDGED].mean
