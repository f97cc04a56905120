"""What the styles of a Word document say of a paragraph: its level as a heading, and lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"

_HEADING_NAME = re.compile(r"(?:heading|überschrift|titre|título|titolo|заголовок) ?([1-9])", re.I)
_MAX_INHERITED = 20


@dataclass(frozen=True, slots=True)
class Style:
    """Args: level: of a heading from 1, 0 for text; is_title: the document's own title."""

    level: int = 0
    is_title: bool = False
    is_list: bool = False
    is_hidden: bool = False


_PLAIN = Style()


class Styles:
    """Styles by id, with what they inherit."""

    def __init__(self, root: Any | None) -> None:
        self._elements: dict[str, Any] = {}
        self._resolved: dict[str, Style] = {}
        self._default: str | None = None
        for element in root.iterfind(f"{W}style") if root is not None else ():
            style_id = element.get(f"{W}styleId")
            if style_id is None:
                continue
            self._elements[style_id] = element
            is_default = element.get(f"{W}default") in {"1", "true", "on"}
            if is_default and element.get(f"{W}type") == "paragraph":
                self._default = style_id

    def of_paragraph(self, properties: Any | None) -> Style:
        """The style of a paragraph, given its `w:pPr`."""
        named = None if properties is None else properties.find(f"{W}pStyle")
        style_id = self._default if named is None else named.get(f"{W}val")
        style = self._resolve(style_id) if style_id is not None else _PLAIN
        return style if properties is None else _direct(properties, style)

    def is_hidden_run(self, properties: Any | None) -> bool:
        """Whether a run with this `w:rPr` is not shown."""
        if properties is None:
            return False
        own = properties.find(f"{W}vanish")
        if own is not None:
            return _is_on(own)
        named = properties.find(f"{W}rStyle")
        return named is not None and self._resolve(named.get(f"{W}val")).is_hidden

    def _resolve(self, style_id: str) -> Style:
        found = self._resolved.get(style_id)
        if found is None:
            chain: list[Any] = []
            current: str | None = style_id
            while current in self._elements and len(chain) < _MAX_INHERITED:
                element = self._elements[current]
                chain.append(element)
                based_on = element.find(f"{W}basedOn")
                current = None if based_on is None else based_on.get(f"{W}val")
            found = _PLAIN
            for element in reversed(chain):
                found = _own(element, found)
            self._resolved[style_id] = found
        return found


def _own(element: Any, inherited: Style) -> Style:
    name_element = element.find(f"{W}name")
    name = "" if name_element is None else (name_element.get(f"{W}val") or "").strip().lower()
    style = inherited
    match = _HEADING_NAME.fullmatch(name)
    if match is not None:
        style = Style(level=int(match.group(1)))
    elif name == "title":
        style = Style(is_title=True)
    elif name[:4] == "toc " and name[4:].isdigit():
        # A table of contents says again what the headings say.
        style = Style(is_hidden=True)
    elif name.startswith("list "):
        style = Style(is_list=True)
    run = element.find(f"{W}rPr/{W}vanish")
    if run is not None:
        style = Style(style.level, style.is_title, style.is_list, is_hidden=_is_on(run))
    properties = element.find(f"{W}pPr")
    return style if properties is None else _direct(properties, style)


def _direct(properties: Any, style: Style) -> Style:
    """What a `w:pPr` changes of a style."""
    level, is_list = style.level, style.is_list
    outline = properties.find(f"{W}outlineLvl")
    if outline is not None:
        value = outline.get(f"{W}val") or ""
        # 9 is body text.
        level = int(value) + 1 if value in set("012345678") else 0
    numbering = properties.find(f"{W}numPr")
    if numbering is not None:
        number_id = numbering.find(f"{W}numId")
        is_list = number_id is not None and number_id.get(f"{W}val") != "0"
    return Style(level, style.is_title, is_list, style.is_hidden)


def _is_on(element: Any) -> bool:
    return element.get(f"{W}val") not in {"0", "false", "off"}
