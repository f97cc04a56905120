"""One route of a model server, over HTTP: asked again where that may help, with clear errors.

Messages never quote what was sent, nor what the server says about it: both may hold memory text.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from memos_vllm.errors import ConfigurationError, InvalidRequest, TooLarge, Unavailable

logger = logging.getLogger(__name__)

_MODEL_AT_URL = re.compile(r"(?P<model>[^\s#]+?)@(?P<url>https?://[^\s#]+)")
_CODE_WORD = re.compile(r"[\w.-]{1,64}", re.ASCII)

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4.0
# What another try may mend.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED_TEXT = frozenset({400, 422})


def split_model_and_url(setting: str, *, kind: str) -> tuple[str, str]:
    """Take "MODEL@URL" apart.

    Raises:
        ConfigurationError: it has another form, or the URL holds what must not be in a log.
    """
    found = _MODEL_AT_URL.fullmatch(setting)
    if found is None:
        raise ConfigurationError(
            f"the {kind} setting needs a model and the address of its server, like "
            f"openai:MODEL@http://host:8000/v1"
        )
    url = found["url"]
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
    if not has_host:
        raise ConfigurationError(f"the {kind} setting has no address that can be reached")
    if parts.username is not None or parts.query:
        raise ConfigurationError(
            f"the address in the {kind} setting holds a password or parameters; it is stored and "
            "logged, so give the API key by its own setting"
        )
    return found["model"], url.rstrip("/")


def route_url(url: str, *routes: str) -> str:
    """The address of the first of `routes`, unless `url` ends with one of them already.

    A URL without a path gets "/v1" first.
    """
    path = urlsplit(url).path.rstrip("/")
    if any(path.endswith(f"/{route}") for route in routes):
        return url
    return f"{url}/{routes[0]}" if path else f"{url}/v1/{routes[0]}"


class ModelEndpoint:
    """POSTs JSON to one URL. Thread-safe.

    Args:
        what: names the server in messages, like "the embeddings server".
        api_key: sent as a bearer token.
        transport: in place of the network.
        sleep: waits between tries.
        clock: seconds that only grow.
        chance: a number from 0 to 1, for the length of a pause.
    """

    def __init__(
        self,
        url: str,
        *,
        what: str,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.url = url
        self.name = f"{what} at {url}"
        self._sleep = sleep
        self._clock = clock
        self._chance = chance
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(headers=headers, transport=transport, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def post(self, body: object, *, timeout_seconds: float, patience_seconds: float) -> object:
        """Send `body` and return the JSON of the answer.

        Args:
            timeout_seconds: the longest silence of the server within one try.
            patience_seconds: how long after the call another try may still start.
        Raises:
            InvalidRequest: the server refuses this body.
            TooLarge: it is too long for the server.
            Unavailable: no good answer within the patience.
            ConfigurationError: the address, the model's name or the API key is wrong.
        """
        give_up = self._clock() + patience_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            asked_for: float | None = None
            try:
                response = self._http.post(self.url, json=body, timeout=timeout_seconds)
            except httpx.TimeoutException:
                problem = f"{self.name} did not answer within {timeout_seconds:g} s"
            except httpx.TransportError as error:
                problem = f"{self.name} cannot be reached ({type(error).__name__}); is it running?"
            else:
                if response.is_success:
                    return self._json(response)
                if response.status_code not in _PASSING:
                    raise self._refusal(response)
                problem = f"{self.name} answered status {_status(response)}"
                asked_for = _retry_after(response)
            # Half of it by chance: callers that failed together do not come back together.
            wait = max(asked_for or 0.0, pause * (1 + self._chance()) / 2)
            if self._clock() + wait > give_up:
                raise Unavailable(problem, retry_after_seconds=max(1, round(wait)))
            logger.info("memos: %s; another try in %.1f s", problem, wait)
            self._sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def malformed(self, reason: str) -> Unavailable:
        """For an answer that is no answer: raise it."""
        return Unavailable(f"{self.name} answered something else than expected: {reason}")

    def _json(self, response: httpx.Response) -> object:
        try:
            answer: object = response.json()
        except ValueError as error:
            raise self.malformed("not JSON") from error
        return answer

    def _refusal(self, response: httpx.Response) -> Exception:
        status = response.status_code
        said = f"{self.name} answered status {_status(response)}"
        if status in _REFUSED_TEXT:
            return InvalidRequest(f"{said}: it refuses this text, which may be too long for it")
        if status == 413:
            return TooLarge(f"{said}: the text is too long for it")
        if status in (401, 403):
            return ConfigurationError(f"{said}: check the API key")
        return ConfigurationError(f"{said}: check its address and the name of the model")


def _status(response: httpx.Response) -> str:
    """The status, with the machine-readable code of the body when it is a single word."""
    try:
        body = response.json()
        error = body.get("error", body)
        for name in ("code", "type"):
            code = error.get(name)
            if isinstance(code, str) and _CODE_WORD.fullmatch(code):
                return f"{response.status_code} ({code})"
    except (ValueError, AttributeError):
        pass
    return str(response.status_code)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    # Absent, or a date: our own pause will do.
    except (KeyError, ValueError):
        return None
