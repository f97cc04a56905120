"""Keeps keys out of the web server's log.

At level debug it writes the headers of sockets, and always the address that was asked for, where
somebody may have put a key by mistake.
"""

from __future__ import annotations

import logging

from memos_vllm.domain.keys import redact_keys

_LOGGERS = ("uvicorn.error", "uvicorn.access")


class KeyRedaction(logging.Filter):
    """Cuts keys in a record's arguments down to their public part."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                redact_keys(value) if isinstance(value, str) else value for value in record.args
            )
        return True


_redaction = KeyRedaction()


def redact_server_logs() -> None:
    """Set the filter; once a process, however often it is called."""
    for name in _LOGGERS:
        # A logger adds the same filter only once.
        logging.getLogger(name).addFilter(_redaction)
