"""What a model's chat template does with system text, found by rendering.

Templates differ: SmolLM2 adds a system text of its own when the caller gives none, Gemma refuses
a system role, some Mistral templates put system text into the last user turn, Llama-3.1 writes a
date and its tool preamble before it. Nothing here reads the template's source; it renders short
conversations and looks at what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox

from memos_vllm.activation.prefix import Message, Placement
from memos_vllm.errors import TemplateError

# Words that no template contains and no trimming changes.
_SYSTEM_PROBE = "Zq7 system probe qZ7"
_USER_PROBE = "Zq7 user probe qZ7"
_REPLY_PROBE = "Zq7 reply probe qZ7"


class ChatTemplate(Protocol):
    """Renders a conversation to the text of a prompt."""

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Raises TemplateError when the template cannot render these messages."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What `compose_messages` has to know of a template.

    Args:
        placement: SYSTEM where system text stays at the start of every prompt. FIRST_USER where
            there is no system role, and where the template moves system text into the last user
            turn: the block would move with every turn and never be reused.
        default_system: the system text that the template adds when given none, else "".
    """

    placement: Placement
    default_system: str = ""


def probe_template(template: ChatTemplate) -> TemplateTraits:
    """Find a template's traits by rendering short conversations.

    Raises:
        TemplateError: it cannot render even a single user message.
    """
    system = _message("system", _SYSTEM_PROBE)
    user = _message("user", _USER_PROBE)
    without = template.render([user])
    try:
        with_system = template.render([system, user])
        longer = template.render([system, user, _message("assistant", _REPLY_PROBE), user])
    except TemplateError:
        return TemplateTraits(Placement.FIRST_USER)
    opening, found, closing = with_system.partition(_SYSTEM_PROBE)
    if not found or not longer.startswith(opening + _SYSTEM_PROBE):
        return TemplateTraits(Placement.FIRST_USER)
    default = _between(without, opening, closing)
    if default and template.render([_message("system", default), user]) != without:
        default = ""
    return TemplateTraits(Placement.SYSTEM, default)


class JinjaChatTemplate:
    """A template rendered as transformers renders it: sandboxed, with its extra functions.

    For tests and tools; a server renders through vLLM, which uses the tokenizer's own.

    Args:
        source: the Jinja source.
        variables: what the tokenizer would add, such as bos_token.
        now: the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, object] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja: {error}") from error
        self._variables = dict(variables or {})

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Render; `kwargs` are template variables such as `tools` or `enable_thinking`.

        Raises:
            TemplateError: the template raised, or used the messages in a way that fails.
        """
        values = {"tools": None, "add_generation_prompt": False, **self._variables, **kwargs}
        try:
            return self._template.render(messages=list(messages), **values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateError(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error


def load_template(folder: Path) -> JinjaChatTemplate:
    """The chat template of a prepared model's folder.

    Raises:
        TemplateError: it has none, or one that is not valid.
    """
    config = folder / "tokenizer_config.json"
    file = folder / "chat_template.jinja"
    try:
        settings: dict[str, Any] = json.loads(config.read_text()) if config.exists() else {}
        source = file.read_text(encoding="utf-8") if file.exists() else settings["chat_template"]
    except (OSError, ValueError, KeyError) as error:
        raise TemplateError(f"{folder} has no chat template that can be read") from error
    tokens = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and isinstance(value, str)
    }
    return JinjaChatTemplate(source, variables=tokens)


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _between(text: str, opening: str, closing: str) -> str:
    fits = len(text) >= len(opening) + len(closing)
    if not (fits and text.startswith(opening) and text.endswith(closing)):
        return ""
    return text[len(opening) : len(text) - len(closing)]


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
