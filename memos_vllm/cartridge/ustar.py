"""Headers of tar files, as much of the format as an archive needs: regular files, short names.

Python's tarfile also reads links, sparse files and extended headers, from anywhere in a name or a
number; here those are not understood, and so need not be forbidden one by one.
"""

from __future__ import annotations

import re

from memos_vllm.errors import InvalidRequest

BLOCK = 512
END = bytes(2 * BLOCK)
# Up to eleven octal digits.
MAX_FILE_BYTES = 8**11 - 1

_NAME = re.compile(rb"[A-Za-z0-9._/-]{1,99}\x00+")
_OCTAL = re.compile(rb" *([0-7]{1,11})[ \x00]+")
_MAGIC = b"ustar\x0000"
_REGULAR = b"0"


def header(name: str, size_bytes: int) -> bytes:
    """The block before a file's content. No owner and no time: equal cubes give equal bytes."""
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {size_bytes} bytes, more than a tar header can say")
    block = b"".join(
        (
            name.encode("ascii").ljust(100, b"\0"),
            b"0000644\0",
            b"0000000\0" * 2,
            b"%011o\0" % size_bytes,
            b"%011o\0" % 0,
            b" " * 8,
            _REGULAR,
            bytes(100),
            _MAGIC,
        )
    ).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def parse(block: bytes) -> tuple[str, int]:
    """Name and size of the file that follows.

    Raises:
        InvalidRequest: anything but a plain file with a short, plain name.
    """
    name, size, checksum = block[:100], _OCTAL.fullmatch(block[124:136]), block[148:156]
    stated = _OCTAL.fullmatch(checksum)
    blanked = block[:148] + b" " * 8 + block[156:]
    if stated is None or int(stated[1], 8) != sum(blanked) or block[257:265] != _MAGIC:
        raise InvalidRequest("the archive holds something that is not a file header of tar (ustar)")
    if block[156:157] != _REGULAR or any(block[157:257]) or any(block[345:500]):
        raise InvalidRequest("the archive holds something else than plain files")
    if _NAME.fullmatch(name) is None or size is None:
        raise InvalidRequest("the archive holds a file with a name or a size that is not allowed")
    return name.rstrip(b"\0").decode("ascii"), int(size[1], 8)


def padding(size_bytes: int) -> int:
    """Zeros between a file's end and the next header."""
    return -size_bytes % BLOCK
