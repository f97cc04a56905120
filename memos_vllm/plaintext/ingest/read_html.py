"""HTML: what a person would read on the page, without what surrounds it.

Scripts, styles, frames, forms' controls, navigation and hidden parts go; so do the targets of
links and everything else that would have to be fetched. Nothing here follows a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from memos_vllm.errors import InvalidRequest
from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.decoding import charset_in_page, decode_text
from memos_vllm.plaintext.ingest.document import Block, IngestLimits, ParsedDocument
from memos_vllm.plaintext.ingest.html_flow import Flow

_DROPPED = frozenset(
    [
        "script",
        "style",
        "template",
        "noscript",
        "iframe",
        "frame",
        "frameset",
        "object",
        "embed",
        "applet",
        "svg",
        "canvas",
        "audio",
        "video",
        "source",
        "track",
        "picture",
        "img",
        "map",
        "area",
        "head",
        "title",
        "base",
        "link",
        "meta",
        "nav",
        "button",
        "select",
        "datalist",
        "textarea",
        "dialog",
        "menu",
        "rp",
        "rt",
        "progress",
        "meter",
    ]
)
_SURROUNDING_ROLES = frozenset(
    ("navigation", "banner", "contentinfo", "search", "menu", "menubar", "dialog", "alertdialog")
)
# Headers and footers inside these belong to the text.
_PARTS = frozenset({"article", "main", "section", "blockquote"})
_HIDING_STYLE = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse)"
    r"|(?:font-size|opacity)\s*:\s*0+(?:\.0+)?(?![.\d])",
    re.IGNORECASE,
)
# A table that holds these arranges a page; its cells are not rows of facts.
_LAYOUT_CONTENT = "table, h1, h2, h3, h4, h5, h6, ul, ol, pre, form, article, section, p + p"
# Below these shares the page's own mark of its content is not believed.
_MAIN_SHARE = 0.25
_ARTICLE_SHARE = 0.5

# The tree builder takes time square in the depth: 0.3 s for 10,000 levels, 30 s for 100,000.
_MAX_DEPTH = 4_000
# And square in the attributes of one tag: 0.8 s for 10,000, 78 s for 100,000.
_MAX_ATTRIBUTES = 5_000
_LONG_TAG_CHARS = 16_384
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
_UNCOUNTED = frozenset(
    # No end tag, or one that may be left out, or formatting that the parser closes by itself.
    [
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "param",
        "source",
        "track",
        "wbr",
        "html",
        "head",
        "body",
        "p",
        "li",
        "dt",
        "dd",
        "tr",
        "td",
        "th",
        "thead",
        "tbody",
        "tfoot",
        "option",
        "optgroup",
        "colgroup",
        "caption",
        "rp",
        "rt",
        "a",
        "b",
        "big",
        "code",
        "em",
        "font",
        "i",
        "nobr",
        "s",
        "small",
        "strike",
        "strong",
        "tt",
        "u",
    ]
)


def read(data: bytes, *, declared: str | None, limits: IngestLimits) -> ParsedDocument:
    """A page as blocks; the parts around its content are left out.

    Args:
        declared: the character set that came with the file.
    Raises:
        InvalidRequest: it is not text, or nested beyond reason.
    """
    page = decode_text(data, declared=declared or charset_in_page(data))
    return read_page(page, is_page=True)


def read_page(page: str, *, is_page: bool) -> ParsedDocument:
    """HTML as blocks.

    Args:
        is_page: whether there may be navigation, headers and footers around the content; false
            for what was made from Markdown.
    Raises:
        InvalidRequest: nested beyond reason.
        MemoryError: the tree does not fit.
    """
    _refuse_absurd(page)
    try:
        tree = LexborHTMLParser(page)
    except SelectolaxError as error:
        # Every string is a page to it; it stops only where it gets no memory.
        raise MemoryError from error
    title_node = tree.css_first("head > title", default=None)
    title = clean_line(title_node.text()) if title_node is not None else None
    body = tree.body
    if body is None:
        return ParsedDocument(title=title or None, blocks=())
    blocks = _content(tree, body) if is_page else _read_tree(body, is_page=False)
    if not blocks and is_page:
        blocks = _read_tree(body, is_page=False)
    return ParsedDocument(title=title or None, blocks=tuple(blocks))


def _refuse_absurd(page: str) -> None:
    depth = 0
    for match in _TAG.finditer(page):
        if match.group(2).lower() in _UNCOUNTED:
            continue
        depth = max(depth - 1, 0) if match.group(1) else depth + 1
        if depth > _MAX_DEPTH:
            raise InvalidRequest(
                f"the document nests its elements more than {_MAX_DEPTH} deep; flatten it",
                param="file",
            )
    for stretch in page.split(">"):
        if len(stretch) > _LONG_TAG_CHARS:
            tag = _TAG.search(stretch)
            if tag is not None and len(stretch[tag.start() :].split()) > _MAX_ATTRIBUTES:
                _refuse_long_tag(stretch[tag.start() :])


def _refuse_long_tag(tag: str) -> None:
    # Prose behind a stray "<b" has as many words, and no equals signs.
    if tag.count("=") > _MAX_ATTRIBUTES or re.search(r"[.!?]\s", tag) is None:
        raise InvalidRequest(
            f"the document holds a tag with more than {_MAX_ATTRIBUTES} attributes; remove them",
            param="file",
        )


def _content(tree: LexborHTMLParser, body: LexborNode) -> list[Block]:
    """The blocks of the part that the page calls its content, if that part is large enough."""
    whole = _read_tree(body, is_page=True)
    for selector, share in (("main, [role=main]", _MAIN_SHARE), ("article", _ARTICLE_SHARE)):
        marked = tree.css(selector)
        if len(marked) == 1:
            blocks = _read_tree(marked[0], is_page=True)
            if _num_chars(blocks) >= share * _num_chars(whole):
                return blocks
    return whole


def _num_chars(blocks: list[Block]) -> int:
    return sum(len(block.text) for block in blocks)


def _read_tree(root: LexborNode, *, is_page: bool) -> list[Block]:
    """Walk without recursion: depth is the document's to choose."""
    flow = Flow()
    stack: list[tuple[LexborNode, bool]] = [(root, False)]
    parts_open = 0
    while stack:
        node, leaving = stack.pop()
        tag = node.tag or ""
        if leaving:
            parts_open -= tag in _PARTS
            flow.leave(tag)
        elif tag == "-text":
            flow.text(node.text_content or "")
        elif not tag[:1].isalpha() or _is_dropped(node, tag, is_page and not parts_open, is_page):
            continue
        else:
            parts_open += tag in _PARTS
            if _enter(flow, node, tag):
                stack.append((node, True))
                stack.extend(reversed([(child, False) for child in _children(node)]))
    flow.flush()
    return flow.blocks


def _children(node: LexborNode) -> Iterator[LexborNode]:
    child = node.child
    while child is not None:
        yield child
        child = child.next


def _is_dropped(node: LexborNode, tag: str, at_page_level: bool, is_page: bool) -> bool:
    if tag in _DROPPED and (is_page or tag != "nav"):
        return True
    if at_page_level and tag in {"header", "footer"}:
        # The title of many pages stands in their header.
        return tag == "footer" or node.css_first("h1", default=None) is None
    attributes = node.attributes
    if not attributes:
        return False
    if "hidden" in attributes and attributes["hidden"] != "until-found":
        return True
    style = attributes.get("style")
    if style and _HIDING_STYLE.search(style):
        return True
    return is_page and attributes.get("role") in _SURROUNDING_ROLES


def _enter(flow: Flow, node: LexborNode, tag: str) -> bool:
    """Tell the flow what begins here; whether its children are to be walked."""
    if tag == "input":
        if node.attributes.get("type") == "checkbox":
            flow.text("[x] " if "checked" in node.attributes else "[ ] ")
        return False
    if tag == "sup":
        return _superscript(flow, node)
    if tag == "table":
        flow.enter_table(is_layout=_is_layout(node))
    elif tag in {"td", "th"}:
        flow.enter_cell(
            is_header=tag == "th", columns=_span(node, "colspan"), rows=_span(node, "rowspan")
        )
    elif tag == "ol":
        flow.enter_list(first=_number(node.attributes.get("start")))
    else:
        flow.enter(tag)
    return True


def _is_layout(table: LexborNode) -> bool:
    # A query finds the node itself too, so its children are asked.
    return any(
        child.css_first(_LAYOUT_CONTENT, default=None) is not None
        for child in _children(table)
        if child.is_element_node
    )


def _superscript(flow: Flow, node: LexborNode) -> bool:
    """An exponent keeps its mark, a footnote its brackets: 10^6, and a claim[2]."""
    text = clean_line(node.text())
    classes = node.attributes.get("class") or ""
    if "footnote-definition" in classes:
        flow.mark(f"[{text}] ")
        return False
    if "footnote" in classes:
        flow.text(f"[{text}]" if text.isalnum() else text)
        return False
    if re.fullmatch(r"[-+−]?\d{1,4}", text):
        flow.text(f"^{text}")
        return False
    flow.enter("sup")
    return True


def _span(node: LexborNode, name: str) -> int:
    return max(_number(node.attributes.get(name)), 1)


def _number(value: str | None) -> int:
    return int(value) if value and re.fullmatch(r"[0-9]{1,5}", value) else 1
