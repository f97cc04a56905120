"""Bytes of a text file to characters: strictly, and never by guessing."""

from __future__ import annotations

import codecs
import re

from memos_vllm.errors import InvalidRequest

# The longer mark first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What pages declare in practice. Nothing that runs code or unpacks, as some of Python's codecs do.
_DECLARABLE = {
    **dict.fromkeys(("utf-8", "utf8"), "utf-8"),
    # Browsers read these as Windows-1252, and pages that declare them mean it.
    **dict.fromkeys(("us-ascii", "ascii", "iso-8859-1", "latin1", "windows-1252"), "cp1252"),
    **{f"iso-8859-{part}": f"iso8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    **{f"windows-{page}": f"cp{page}" for page in (1250, 1251, 1253, 1254, 1255, 1256, 1257, 1258)},
    "iso-8859-9": "cp1254",
    "koi8-r": "koi8-r",
    "koi8-u": "koi8-u",
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "windows-31j"), "cp932"),
    "euc-jp": "euc-jp",
    "euc-kr": "cp949",
    **dict.fromkeys(("gb2312", "gbk", "gb18030"), "gb18030"),
    "big5": "big5hkscs",
}
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([a-zA-Z0-9_.:-]{2,40})")
_META_REACH = 1024

# Tab, line feed, form feed and carriage return are what a text needs; escape colours logs.
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")
_MAX_CONTROL_SHARE = 0.02


def decode_text(data: bytes, *, declared: str | None = None) -> str:
    """The characters of a text file.

    A byte order mark decides; then UTF-8, if it is valid; then what the file or its sender
    declares. Nothing is replaced and nothing guessed.

    Args:
        declared: the name of a character set that came with the file.
    Raises:
        InvalidRequest: not text (NUL or many control characters), or not valid in its encoding;
            the message names the first bad byte.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _checked(_strictly(data, encoding, len(mark)))
    _refuse_nul(data)
    try:
        return _checked(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        encoding = _DECLARABLE.get((declared or "").lower(), "utf-8")
        if encoding == "utf-8":
            raise _invalid(data, error) from None
    return _checked(_strictly(data, encoding, 0))


def declared_charset(media_type: str | None) -> str | None:
    """The character set in `text/html; charset=...`, if there is one."""
    return _find_charset((media_type or "")[:_META_REACH].encode("ascii", "ignore"))


def charset_in_page(data: bytes) -> str | None:
    """The character set that a page names in its first kilobyte, if it does."""
    return _find_charset(data[:_META_REACH])


def _find_charset(header: bytes) -> str | None:
    match = _CHARSET.search(header)
    return match.group(1).decode("ascii") if match else None


def _strictly(data: bytes, encoding: str, skip: int) -> str:
    try:
        return data[skip:].decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"byte {error.start + skip} of the file is not valid in {encoding}, which it declares; "
            "save it again as UTF-8",
            param="file",
        ) from None


def _invalid(data: bytes, error: UnicodeDecodeError) -> InvalidRequest:
    return InvalidRequest(
        f"byte {error.start} of the file (0x{data[error.start]:02x}) is not valid UTF-8; save it "
        "again as UTF-8. Another encoding is taken only with a byte order mark, or when declared, "
        "as in 'text/plain; charset=windows-1252'",
        param="file",
    )


def _refuse_nul(data: bytes) -> None:
    position = data.find(b"\x00")
    if position < 0:
        return
    start = data[:2000]
    halves = (start[0::2].count(0), start[1::2].count(0))
    if max(halves) >= max(4, 0.2 * len(start)) and min(halves) <= 0.05 * len(start):
        raise InvalidRequest(
            "the file looks like UTF-16 without a byte order mark; save it again as UTF-8",
            param="file",
        )
    raise InvalidRequest(
        f"the file is not text: byte {position} is NUL; send a text file in UTF-8", param="file"
    )


def _checked(text: str) -> str:
    position = text.find("\x00")
    if position >= 0:
        raise InvalidRequest(
            f"the file is not text: character {position} is NUL; send a text file", param="file"
        )
    control = len(_CONTROL.findall(text))
    if control > _MAX_CONTROL_SHARE * len(text):
        raise InvalidRequest(
            f"the file is not text: {control} of its {len(text)} characters are control "
            "characters; send a text file in UTF-8",
            param="file",
        )
    return text
