"""The demo's handbook and questions fit together."""

from __future__ import annotations

import pytest

from memos_vllm.activation.prefix import render_memory_block
from memos_vllm.config import default_models_dir
from memos_vllm.demo.handbook import demo_questions, handbook_sections, handbook_text

PREPARED = default_models_dir() / "smollm2-135m-instruct" / "tokenizer.json"


def test_every_answer_stands_in_the_handbook() -> None:
    for question in demo_questions():
        assert question.answered_by(handbook_text())
        assert not question.answered_by(question.question)
    assert len(demo_questions()) == 3


def test_the_sections_hold_the_whole_handbook_behind_its_introduction() -> None:
    sections = handbook_sections()
    rebuilt = "".join(f"## {section.title}\n\n{section.text}\n\n" for section in sections)
    assert handbook_text().endswith(rebuilt.removesuffix("\n"))
    assert len({section.title for section in sections}) == len(sections)


@pytest.mark.skipif(not PREPARED.exists(), reason="smollm2-135m-instruct is not prepared here")
def test_the_rendered_handbook_has_the_promised_number_of_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(PREPARED))
    assert 3072 <= len(tokenizer.encode(handbook_text()).ids) <= 3400
    assert 3072 <= len(tokenizer.encode(render_memory_block(None, handbook_sections())).ids) <= 3400
