"""Prompts of given lengths: memory that is the same every time, questions that never are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from memos_vllm.bench.prompts import Prompts
from memos_vllm.errors import ConfigurationError, TemplateError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if messages[0].role != 'system' %}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a tokenizer that takes each letter and mark for a token."""
    alphabet = {chr(code): number for number, code in enumerate(range(32, 127))}
    tokenizer = Tokenizer(models.WordLevel({**alphabet, "\n": 100, "[UNK]": 101}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_memory_is_at_least_as_long_as_asked_and_close_to_it(folder: Path) -> None:
    prompts = Prompts(folder, seed=1)
    for tokens in (512, 1024, 3072):
        memory = prompts.memory(tokens)
        assert memory.num_tokens == prompts.count(memory.block)
        # A sentence of this tokenizer has up to a hundred tokens, and a note opens with some more.
        assert tokens + 8 <= memory.num_tokens <= tokens + 138
        assert all(note.text in memory.block for note in memory.notes)


def test_a_seed_decides_every_memory_and_lengths_share_no_beginning(folder: Path) -> None:
    one, same, other = (Prompts(folder, seed=seed) for seed in (1, 1, 2))
    assert one.memory(1024) == same.memory(1024)
    assert one.memory(1024) != other.memory(1024)
    assert one.memory(1024).notes[0] != one.memory(2048).notes[0]


def test_no_two_questions_begin_alike(folder: Path) -> None:
    prompts = Prompts(folder, seed=1)
    openings = [prompts.question(256)[0]["content"][:12] for _ in range(300)]
    assert len(set(openings)) == 300


def test_a_question_has_about_as_many_tokens_as_asked(folder: Path) -> None:
    prompts = Prompts(folder, seed=1)
    for tokens in (96, 256, 768):
        (message,) = prompts.question(tokens)
        assert abs(prompts.count(message["content"]) - tokens) <= 4


def test_no_two_salts_are_the_same(folder: Path) -> None:
    prompts = Prompts(folder, seed=1)
    salts = [prompts.salt() for _ in range(100)]
    assert all(one != other for one, other in itertools.combinations(salts, 2))


def test_memory_stands_before_the_question_as_the_template_allows(folder: Path) -> None:
    prompts = Prompts(folder, seed=1)
    memory = prompts.memory(512)
    first, second = prompts.with_memory([{"role": "user", "content": "Why?"}], memory)
    assert first["role"] == "system"
    assert first["content"].startswith(memory.block)
    assert second == {"role": "user", "content": "Why?"}


def test_a_folder_without_tokenizer_or_template_is_refused_in_words(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TemplateError, match="no chat template"):
        Prompts(folder, seed=1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json cannot be read"):
        Prompts(folder, seed=1)
