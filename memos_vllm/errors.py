"""Every error that memos_vllm raises on purpose.

    MemosError
    ├── ConfigurationError          a setting or an installation is wrong
    ├── InvalidRequest              the caller sent something unusable (400)
    │   ├── ContextTooLong          memory plus prompt exceed the model's context
    │   └── TemplateError           the model's chat template cannot render this
    ├── Unauthenticated             no valid key (401)
    ├── Forbidden                   for administrators only (403)
    ├── NotFound                    unknown, or not visible to the caller (404)
    │   └── UnknownModel            `model` names nothing that the caller may use
    ├── Conflict                    the state of the object forbids it (409)
    ├── StaleVersion                If-Match did not match (412)
    ├── TooLarge                    over a documented size limit (413)
    ├── Unavailable                 a part is down; try again (503)
    ├── ArtifactError               an artifact cannot be used; it is recomputed
    │   ├── ArtifactCorrupted
    │   ├── ArtifactMissing
    │   └── FingerprintMismatch
    ├── TicketRejected              a ticket is forged, expired, reused or foreign
    └── ApiError                    the client library: the server answered an error

The HTTP status and code of each class stand in one table, `memos_vllm.api.error_table`.
"""

from __future__ import annotations


class MemosError(Exception):
    """Base of the tree; `str(error)` is a message that a user can act on.

    Pickles with its fields, whatever its constructor takes: errors cross processes.
    """

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[MemosError], args: tuple[object, ...], state: dict[str, object]) -> object:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(MemosError):
    """A setting, a file permission or an installation is wrong."""


class InvalidRequest(MemosError):
    """The caller sent something that cannot be used.

    Args:
        message: what was wrong and how to mend it.
        param: the field that was wrong, in dotted form, when there is one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Memory plus prompt exceed what the model can attend to."""

    def __init__(self, *, memory_tokens: int, max_model_len: int, detail: str = "") -> None:
        self.memory_tokens = memory_tokens
        self.max_model_len = max_model_len
        super().__init__(
            f"the memory takes {memory_tokens} tokens and this model's context is "
            f"{max_model_len} tokens{detail}; demote or shorten memories, or serve with a "
            "larger --max-model-len",
            param="memcube_id",
        )


class TemplateError(InvalidRequest):
    """The model's chat template refuses to render the messages."""


class Unauthenticated(MemosError):
    """The request carries no key, or none that is valid: one answer for all of these."""

    def __init__(self) -> None:
        super().__init__(
            "a valid key is needed: send it once, as 'Authorization: Bearer KEY'; an administrator "
            "makes keys with `memos-vllm keys create`"
        )


class Forbidden(MemosError):
    """The caller is known, and this is for administrators only."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is for administrators only; use an administrator's key")


class NotFound(MemosError):
    """The object does not exist, or the caller may not see it: one answer for both."""

    def __init__(self, kind: str, identifier: str) -> None:
        super().__init__(f"{kind} '{identifier}' does not exist")
        self.kind = kind
        self.identifier = identifier


class UnknownModel(NotFound):
    """The model does not exist, or the caller may not use it."""

    def __init__(self, model: str) -> None:
        super().__init__("model", model)


class Conflict(MemosError):
    """The request is well formed, the state of the object forbids it."""


class StaleVersion(MemosError):
    """`If-Match` named another version than the stored one."""

    def __init__(self, *, expected: int, found: int) -> None:
        super().__init__(
            f"If-Match names version {expected} but the object is at version {found}; "
            "read it again and repeat the change"
        )
        self.expected = expected
        self.found = found


class TooLarge(MemosError):
    """Over a documented size limit."""


class Unavailable(MemosError):
    """A part of the system is down for now.

    Args:
        message: which part, and since when if known.
        retry_after_seconds: sent as Retry-After.
    """

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ArtifactError(MemosError):
    """An artifact cannot be used; whoever meets it recomputes."""

    def __init__(self, artifact: str, message: str) -> None:
        super().__init__(f"artifact {artifact}: {message}")
        self.artifact = artifact


class ArtifactCorrupted(ArtifactError):
    """Torn, truncated, altered, or signed with another key."""


class ArtifactMissing(ArtifactError):
    """Gone between lookup and load."""


class FingerprintMismatch(ArtifactError):
    """Made by another model or numerics class; never loaded."""

    def __init__(self, artifact: str, *, expected: str, found: str) -> None:
        super().__init__(
            artifact,
            f"was baked for {found}, this server runs {expected}; "
            "rebuild it with `memos-vllm cube promote`",
        )


class TicketRejected(MemosError):
    """A request's memory ticket is forged, expired, reused or bound to another request."""


class ApiError(MemosError):
    """The server answered a request of this client with an error.

    Args:
        status_code: HTTP status.
        code: the machine-readable code of the error body, when there is one.
        param: the field that was wrong, when there is one.
    """

    def __init__(
        self, message: str, *, status_code: int, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.param = param
