"""Text as it is stored: NFC, plain line ends, and nothing that a reader cannot see.

Characters without a shape can carry instructions that a model reads and a person does not: tags,
runs of variation selectors, bidirectional overrides, zero-width letters. They go. Joiners stay
where a script or an emoji needs them.
"""

from __future__ import annotations

import re
import unicodedata

_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028]")
_PARAGRAPH_ENDS = re.compile("[\x0b\x0c\u2029]")
_INVISIBLE = re.compile(
    "["
    "\x00-\x08\x0e-\x1f\x7f-\x9f"  # control, after line ends have become line feeds
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e"
    "\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffc\ufffe\uffff\ufdd0-\ufdef\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
    "]+"
)
# Joiners shape Arabic and Indic letters, and tie emoji together.
_SHAPED = "\u0600-\u08ff\u0900-\u109f\u1780-\u17ff\u1800-\u18af\ufb50-\ufdff\ufe70-\ufeff"
_EMOJI = "\u2190-\u2bff\u3030\u303d\U0001f000-\U0001faff"
_JOINERS = re.compile(
    f"(?<![{_SHAPED}{_EMOJI}\ufe0f])[\u200c\u200d]+"
    f"|(?<=[{_SHAPED}{_EMOJI}\ufe0f])[\u200c\u200d](?![{_SHAPED}{_EMOJI}])"
    "|(?<=[\u200c\u200d])[\u200c\u200d]+"
)
_SELECTOR = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
# One selector may follow a symbol or an ideograph; a run of them is a hidden message.
_SELECTORS = re.compile(
    "(?<![#*0-9\u00a9\u00ae\u203c-\u303d\u3297\u3299\u3400-\u9fff\uf900-\ufaff"
    f"\u1820-\u18aa\U00010000-\U0003ffff])[{_SELECTOR}]+|(?<=[{_SELECTOR}])[{_SELECTOR}]+"
)
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000\t]")
_RUN_OF_SPACES = re.compile(" {2,}")
_AROUND_LINE_ENDS = re.compile(" ?\n[ \n]*")
_WHITE = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """`text` in the form in which it is stored; white space stays as it is.

    Idempotent. Form feeds and paragraph separators become blank lines.
    """
    if "\r" in text or not text.isascii():
        text = _LINE_ENDS.sub("\n", text)
    text = _PARAGRAPH_ENDS.sub("\n\n", text)
    text = _INVISIBLE.sub("", text)
    if text.isascii():
        return text
    text = _SELECTORS.sub("", _JOINERS.sub("", text))
    return unicodedata.normalize("NFC", text)


def clean_prose(text: str) -> str:
    """Clean text in which every run of blanks is one space, and of line feeds one."""
    text = _SPACES.sub(" ", clean_text(text))
    return _AROUND_LINE_ENDS.sub("\n", _RUN_OF_SPACES.sub(" ", text)).strip()


def clean_line(text: str) -> str:
    """Clean text as one line: every run of white space is one space."""
    return _WHITE.sub(" ", clean_text(text)).strip()


def clean_code(text: str) -> str:
    """Clean text whose indentation counts; blank lines around it and at line ends go."""
    lines = [line.rstrip() for line in clean_text(text).replace("\xa0", " ").split("\n")]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines)
