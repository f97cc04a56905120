"""The process that parses one file: `python -m memos_vllm.plaintext.ingest.worker`.

Standard input holds one line of JSON (`wire.Task`) and then the bytes; standard output gets one
answer. It imports one reader, shuts itself in, parses, answers and ends.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol, cast

from memos_vllm.errors import InvalidRequest, MemosError, TooLarge
from memos_vllm.plaintext.ingest import sandbox, wire
from memos_vllm.plaintext.ingest.document import IngestLimits, ParsedDocument

# Pictures are not read, and decoders of pictures are a favourite of attackers.
_HIDDEN_MODULES = ("PIL",)


class _Reader(Protocol):
    def read(
        self, data: bytes, *, declared: str | None, limits: IngestLimits
    ) -> ParsedDocument: ...


def main() -> None:
    """Read a task, answer it, end."""
    task = wire.decode_task(sys.stdin.buffer.readline())
    limits = task.limits
    sandbox.limit_resources(
        timeout_seconds=limits.timeout_seconds, memory_bytes=limits.memory_bytes
    )
    try:
        data = sys.stdin.buffer.read()
        name = f"memos_vllm.plaintext.ingest.read_{task.kind}"
        hidden: dict[str, Any] = dict.fromkeys(_HIDDEN_MODULES)
        sys.modules.update(hidden)
        reader = cast(_Reader, importlib.import_module(name))
        sandbox.close_doors()
        answer = _answer(reader, data, task)
    except MemoryError:
        # What filled the memory is gone with the frames that held it.
        answer = wire.encode_refusal(_out_of_memory(limits))
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()


def _answer(reader: _Reader, data: bytes, task: wire.Task) -> bytes:
    try:
        parsed = reader.read(data, declared=task.declared, limits=task.limits)
        _check_text(parsed, task.limits)
        return wire.encode_answer(parsed)
    except MemosError as error:
        return wire.encode_refusal(error)
    except RecursionError:
        return wire.encode_refusal(_unreadable(task, "it is nested too deeply"))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        # Parsers fail on hostile bytes in every way there is; to a caller they are all one.
        return wire.encode_refusal(
            _unreadable(task, f"the parser stopped ({type(error).__name__})")
        )


def _check_text(parsed: ParsedDocument, limits: IngestLimits) -> None:
    size_bytes = sum(len(block.text.encode("utf-8")) for block in parsed.blocks)
    if size_bytes == 0:
        raise InvalidRequest("the document holds no text", param="file")
    if size_bytes > limits.max_text_bytes:
        raise TooLarge(
            f"the document holds {size_bytes} bytes of text and the limit is "
            f"{limits.max_text_bytes}; split it"
        )


def _unreadable(task: wire.Task, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the file cannot be read as {task.kind}: {reason}; open it in its own program and save "
        "it again, or send its text as .txt",
        param="file",
    )


def _out_of_memory(limits: IngestLimits) -> TooLarge:
    return TooLarge(
        f"the document needs more than {limits.memory_bytes >> 20} MiB to parse; split it or send "
        "its text as .txt"
    )


if __name__ == "__main__":
    main()
