"""The published template shapes: what is found of them, and where the head of a prompt ends."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.activation.prefix import (
    END_MARKER,
    Placement,
    compose_messages,
    head_of,
    probe_messages,
    render_memory_block,
)
from memos_vllm.activation.templates import JinjaChatTemplate, TemplateTraits, probe_template
from memos_vllm.demo.handbook import handbook_sections
from memos_vllm.errors import TemplateError

tokenizers = pytest.importorskip("tokenizers")

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"
NAMES = ["smollm2", "llama-3.1", "qwen3", "mistral", "gemma"]
SMOLLM2_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
BLOCK = render_memory_block("You speak for Pellworm.", handbook_sections()[:3])

# Follow the block with anything: no tokenizer may reach back into the head.
CALLERS_SYSTEM_TEXTS = [
    "Be brief.",
    "\n\nBe brief.",
    "  spaced",
    "",
    "]]",
    "/slash",
    "7",
    "é",
    "的",
]


def load(name: str) -> JinjaChatTemplate:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return JinjaChatTemplate(source, variables={"bos_token": "<s>", "eos_token": "</s>"})


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


HI = [message("user", "Hi")]
LONGER = [*HI, message("assistant", "Hello."), message("user", "And now?")]


def _pre_tokenizers() -> dict[str, Any]:
    from tokenizers import Regex, pre_tokenizers

    def like(pattern: str) -> Any:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])

    newlines_stick = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "cl100k": like(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + newlines_stick),
        "digits": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "metaspace": pre_tokenizers.Metaspace(),
    }


@pytest.fixture(scope="module", params=["gpt2", "cl100k", "digits", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A small BPE tokenizer of each kind, trained where merges over the end are tempting."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = _pre_tokenizers()[request.param]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    endings = [f"{END_MARKER}\n\n{text}" for text in CALLERS_SYSTEM_TEXTS]
    corpus = [section.text for section in handbook_sections()] + endings * 20 + ["\n\n\n"] * 50
    model.train_from_iterator(corpus, trainer)
    return model


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


class Prompts:
    """Renders conversations with the block in them to token ids, as the server does."""

    def __init__(self, name: str, tokenizer: Any, placement: Placement | None = None) -> None:
        self.template = load(name)
        self.tokenizer = tokenizer
        found = probe_template(self.template)
        self.traits = TemplateTraits(placement or found.placement, found.default_system)

    def head(self, **kwargs: Any) -> list[int]:
        probes = probe_messages(
            BLOCK,
            default_system=self.traits.default_system,
            placement=self.traits.placement,
        )
        first, second = (self.tokens(probe, **kwargs) for probe in probes)
        return head_of(first, second)

    def prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        composed = compose_messages(
            messages,
            block=BLOCK,
            default_system=self.traits.default_system,
            placement=self.traits.placement,
        )
        return self.tokens(composed, **kwargs)

    def tokens(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        text = self.template.render(messages, add_generation_prompt=True, **kwargs)
        return tokens_of(self.tokenizer, text)


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("smollm2", TemplateTraits(Placement.SYSTEM, SMOLLM2_DEFAULT)),
        ("llama-3.1", TemplateTraits(Placement.SYSTEM)),
        ("qwen3", TemplateTraits(Placement.SYSTEM)),
        ("mistral", TemplateTraits(Placement.FIRST_USER)),
        ("gemma", TemplateTraits(Placement.FIRST_USER)),
    ],
)
def test_the_traits_of_each_template_are_found(name: str, traits: TemplateTraits) -> None:
    assert probe_template(load(name)) == traits


@pytest.mark.parametrize("name", NAMES)
def test_every_conversation_starts_with_the_same_head(name: str, tokenizer: Any) -> None:
    prompts = Prompts(name, tokenizer)
    head = prompts.head()
    assert len(head) > 0.95 * len(tokens_of(tokenizer, BLOCK)) - 12
    for messages in (HI, LONGER, [message("user", "\n\nHi")], [message("user", "的")]):
        assert prompts.prompt(messages)[: len(head)] == head
    for text in CALLERS_SYSTEM_TEXTS:
        for messages in (HI, LONGER):
            composed = prompts.prompt([message("system", text), *messages])
            assert composed[: len(head)] == head


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_prompt_shares_only_the_templates_opening(name: str, tokenizer: Any) -> None:
    prompts = Prompts(name, tokenizer)
    shared = head_of(prompts.head(), prompts.tokens(HI))
    assert len(shared) < 0.2 * len(prompts.head())


def test_another_memory_is_another_head(tokenizer: Any) -> None:
    prompts = Prompts("smollm2", tokenizer)
    changed = compose_messages(HI, block=BLOCK.replace("Rosa", "Anna", 1))
    assert len(head_of(prompts.head(), prompts.tokens(changed))) < len(prompts.head())


def test_smollm2_keeps_its_default_system_text_behind_the_block() -> None:
    composed = compose_messages(HI, block=BLOCK, default_system=SMOLLM2_DEFAULT)
    text = load("smollm2").render(composed, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{BLOCK}\n{SMOLLM2_DEFAULT}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("change", [{"tools": TOOLS}, {"date_string": "27 Jul 2024"}])
def test_llama_with_tools_or_another_date_has_another_head(
    change: dict[str, Any], tokenizer: Any
) -> None:
    prompts = Prompts("llama-3.1", tokenizer)
    head = prompts.head()
    assert len(head_of(head, prompts.prompt(HI, **change))) < 0.2 * len(head)
    # Baked under the same change it is reused again.
    changed = prompts.head(**change)
    assert prompts.prompt(LONGER, **change)[: len(changed)] == changed


@pytest.mark.parametrize("change", [{"tools": TOOLS}, {"enable_thinking": False}])
def test_qwen3_keeps_its_head_with_tools_and_without_thinking(
    change: dict[str, Any], tokenizer: Any
) -> None:
    prompts = Prompts("qwen3", tokenizer)
    assert prompts.prompt(HI, **change) != prompts.prompt(HI)
    assert prompts.prompt(HI, **change)[: len(prompts.head())] == prompts.head()


def test_system_text_in_the_last_user_turn_would_move_the_head_with_every_turn(
    tokenizer: Any,
) -> None:
    prompts = Prompts("mistral", tokenizer, Placement.SYSTEM)
    head = prompts.head()
    assert prompts.prompt(HI)[: len(head)] == head
    assert len(head_of(head, prompts.prompt(LONGER))) < 0.2 * len(head)


def test_mistral_with_tools_before_the_only_turn_has_another_head(tokenizer: Any) -> None:
    prompts = Prompts("mistral", tokenizer)
    head = prompts.head()
    assert len(head_of(head, prompts.prompt(HI, tools=TOOLS))) < 0.2 * len(head)
    assert prompts.prompt(LONGER, tools=TOOLS)[: len(head)] == head


def test_a_template_that_drops_system_text_gets_the_block_in_the_user_turn() -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert probe_template(JinjaChatTemplate(source)).placement is Placement.FIRST_USER


def test_a_text_that_the_template_always_adds_is_no_default() -> None:
    source = (
        "{% set own = messages[0].role == 'system' %}"
        "<sys>Be good. {{ messages[0].content if own }}</sys>"
        "{% for m in messages[1 if own else 0:] %}<{{ m.content }}>{% endfor %}"
    )
    assert probe_template(JinjaChatTemplate(source)) == TemplateTraits(Placement.SYSTEM)


def test_a_template_that_cannot_render_says_so() -> None:
    broken = JinjaChatTemplate("{{ raise_exception('no chat with me') }}")
    with pytest.raises(TemplateError, match="no chat with me"):
        probe_template(broken)
    with pytest.raises(TemplateError, match="not valid Jinja"):
        JinjaChatTemplate("{% if %}")
    with pytest.raises(TemplateError, match="cannot render"):
        load("smollm2").render([message("user", "x") | {"content": None}])


def test_a_template_gets_the_functions_that_transformers_gives() -> None:
    source = "{{ strftime_now('%d %b %Y') }} {{ [{'a': '<é>'}] | tojson }}"
    template = JinjaChatTemplate(source, now=lambda: datetime(2026, 1, 2))
    assert template.render([]) == '02 Jan 2026 [{"a": "<é>"}]'


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(TemplateError, match="cannot render"):
        JinjaChatTemplate("{{ messages.append(1) }}").render([])
    with pytest.raises(TemplateError, match="cannot render"):
        JinjaChatTemplate("{{ ''.__class__.__mro__ }}").render([])
