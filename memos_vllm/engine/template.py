"""The served model's chat template, as `activation.templates` probes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError as JinjaError

from memos_vllm.errors import TemplateError


class TokenizerTemplate:
    """A tokenizer's template.

    Args:
        tokenizer: transformers' or vLLM's.
        chat_template: replaces the tokenizer's own when given (`--chat-template`).
        variables: the server's default template options.
    """

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None, variables: Mapping[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        options = {"add_generation_prompt": True, **self._variables, **kwargs}
        if self._chat_template is not None:
            options["chat_template"] = self._chat_template
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **options
            )
        except (JinjaError, TypeError, ValueError, LookupError) as error:
            raise TemplateError(
                f"the model's chat template cannot render this: {error}", param="messages"
            ) from error
        return str(text)


def special_tokens_of(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer turns into control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if getattr(token, "special", False)}
    return sorted(special | {str(token) for token in getattr(tokenizer, "all_special_tokens", ())})
