"""What the client raises beyond the shared tree.

MemosError
├── ApiError                    the server answered an error
│   ├── ApiBadRequest           400, 422
│   ├── ApiUnauthorized         401, 403
│   ├── ApiNotFound             404
│   ├── ApiConflict             409
│   ├── ApiStaleVersion         412
│   ├── ApiTooLarge             413
│   ├── ApiRateLimited          429, with retry_after_seconds
│   └── ApiUnavailable          503, with retry_after_seconds
├── ServerUnreachable           no connection, or it broke
├── ReplyTimeout                connected, but no answer in time
├── UnexpectedReply             an answer that is not this API's
└── JobFailed                   the job ended without success
    └── JobTimeout              the job did not end within the given time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memos_vllm.errors import ApiError, MemosError

if TYPE_CHECKING:
    from memos_vllm.client.objects import JobInfo


class ApiBadRequest(ApiError):
    """The server cannot use what was sent; `param` names the field."""


class ApiUnauthorized(ApiError):
    """No key, an unknown key, or one that may not do this."""


class ApiNotFound(ApiError):
    """The object does not exist, or this key may not see it."""


class ApiConflict(ApiError):
    """The state of the object forbids it, or an id is taken."""


class ApiStaleVersion(ApiError):
    """`if_match` named another version than the stored one."""


class ApiTooLarge(ApiError):
    """Over a documented size limit."""


class ApiRetryLater(ApiError):
    """Worth another try.

    Args:
        retry_after_seconds: what the server asked for, None if it named no time.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, status_code=status_code, code=code, param=param)
        self.retry_after_seconds = retry_after_seconds


class ApiRateLimited(ApiRetryLater):
    """Over a limit of requests."""


class ApiUnavailable(ApiRetryLater):
    """A part of the server is down or not ready yet."""


class ServerUnreachable(MemosError):
    """No connection to the server, or it broke before the answer was complete."""


class ReplyTimeout(MemosError):
    """The server took the request and did not answer in time."""


class UnexpectedReply(MemosError):
    """The answer is not one that this API gives; often another server at that address."""


class JobFailed(MemosError):
    """A job that was waited for failed or was cancelled.

    Args:
        job: the job as it was last seen.
    """

    def __init__(self, message: str, *, job: JobInfo) -> None:
        super().__init__(message)
        self.job = job


class JobTimeout(JobFailed):
    """A job that was waited for is still going; it goes on in the server."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: ApiBadRequest,
    401: ApiUnauthorized,
    403: ApiUnauthorized,
    404: ApiNotFound,
    409: ApiConflict,
    412: ApiStaleVersion,
    413: ApiTooLarge,
    422: ApiBadRequest,
    429: ApiRateLimited,
    503: ApiUnavailable,
}


def api_error(
    message: str,
    *,
    status_code: int,
    code: str | None = None,
    param: str | None = None,
    retry_after_seconds: float | None = None,
) -> ApiError:
    """The subclass of ApiError that stands for this status."""
    kind = _BY_STATUS.get(status_code, ApiError)
    if issubclass(kind, ApiRetryLater):
        return kind(
            message,
            status_code=status_code,
            code=code,
            param=param,
            retry_after_seconds=retry_after_seconds,
        )
    return kind(message, status_code=status_code, code=code, param=param)
