"""Many chats at once against one server, sent by vLLM's own bench client.

The client runs as a child; what it measured comes back request by request, so that every figure
here can be computed anew from the raw samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memos_vllm.bench.metrics import read_metrics
from memos_vllm.bench.traffic import PlannedChat
from memos_vllm.errors import ConfigurationError, MemosError

_CLIENT = "memos_vllm.engine.load_client"
_LOG_TAIL_LINES = 15
# By what the connector did for them; plain vLLM has no such counter.
_SOURCES = ("memos_requests_total", "kind")


class LoadFailed(MemosError):
    """The client ended without a result; the message ends with its last log lines."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent, and how fast.

    Each run against the same server needs questions of another seed: it has cached those of the
    last one.

    Attributes:
        concurrency: at most so many chats are under way; others wait in the client.
        request_rate: chats a second, arriving as a Poisson process; `math.inf` for all at once,
            which shows how many the server can answer.
        limit_seconds: a chat whose first token takes longer is not good.
        seed: of the arrivals.
    """

    chats: tuple[PlannedChat, ...]
    concurrency: int
    request_rate: float
    limit_seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One chat as the client saw it.

    Attributes:
        cube: whose memory it used; None for plain traffic.
        arrived_seconds: when it was due, from the first one's arrival.
        waited_seconds: in the client, until fewer than `concurrency` were under way.
        ttft_seconds: from sending to the first chunk, without the wait.
        total_seconds: from sending to the last token.
        gap_seconds: between chunks, as vLLM's client takes them. The first one is no token's: the
            role has a chunk of its own, sent with the first token's.
        error: why it does not count; None when it was answered in full.
    """

    cube: str | None
    arrived_seconds: float
    waited_seconds: float
    ttft_seconds: float
    total_seconds: float
    gap_seconds: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    error: str | None

    @property
    def tokens_per_second(self) -> float:
        """How fast this answer streamed after its first token; 0 for fewer than two tokens."""
        seconds = self.total_seconds - self.ttft_seconds
        return (self.output_tokens - 1) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What one plan gave.

    Attributes:
        duration_seconds: from the first arrival to the last answer's end.
        reported_goodput_per_second: vLLM's own figure. It counts a stream that broke off after
            its first token; `goodput_per_second` does not.
        output_tokens_per_second: of all answers together, by vLLM's client.
        sources: memory chats by where the server had their memory from, from its metrics.
    """

    concurrency: int
    request_rate: float
    limit_seconds: float
    duration_seconds: float
    reported_goodput_per_second: float
    output_tokens_per_second: float
    vllm: str
    requests: tuple[LoadRequest, ...]
    sources: Mapping[str, int] = field(default_factory=dict)

    @property
    def answered(self) -> tuple[LoadRequest, ...]:
        return tuple(one for one in self.requests if one.error is None)

    @property
    def errors(self) -> tuple[str, ...]:
        return tuple(one.error for one in self.requests if one.error is not None)

    @property
    def ttft_seconds(self) -> tuple[float, ...]:
        return tuple(one.ttft_seconds for one in self.answered)

    @property
    def gap_seconds(self) -> tuple[float, ...]:
        """Between one token and the next, of all answers."""
        return tuple(gap for one in self.answered for gap in one.gap_seconds[1:])

    @property
    def chats_per_second(self) -> float:
        return len(self.answered) / self.duration_seconds

    @property
    def goodput_per_second(self) -> float:
        """Chats a second that were answered in full, their first token within the limit."""
        good = sum(one.ttft_seconds <= self.limit_seconds for one in self.answered)
        return good / self.duration_seconds

    @property
    def felt_goodput_per_second(self) -> float:
        """The same, with the wait in the client counted: what a user feels at this rate."""
        good = sum(
            one.waited_seconds + one.ttft_seconds <= self.limit_seconds for one in self.answered
        )
        return good / self.duration_seconds

    def tokens_per_second(self, *, with_memory: bool) -> tuple[float, ...]:
        """Each answer's own speed while the others streamed: of memory chats, or of plain ones."""
        return tuple(
            one.tokens_per_second
            for one in self.answered
            if (one.cube is not None) == with_memory and one.output_tokens > 1
        )


def ttft_ratios(run: LoadRun, base: LoadRun) -> tuple[float, ...]:
    """How much longer each chat waited for its first token than the same chat in `base`.

    Of two runs of plans with the same questions and the same seed; a chat that failed in either is
    left out. Between a server with the plugin and one without, on questions without memory, this is
    what the plugin costs plain traffic.
    """
    pairs = zip(run.requests, base.requests, strict=True)
    return tuple(
        one.ttft_seconds / other.ttft_seconds
        for one, other in pairs
        if one.error is None and other.error is None
    )


def run_load(
    plan: LoadPlan, *, url: str, model: str, tokenizer: Path, timeout_seconds: float = 3600.0
) -> LoadRun:
    """Send a plan's chats to the server at `url` and wait for every answer.

    Args:
        model: the name under which the server serves.
        tokenizer: the model's folder; nothing is fetched.
    Raises:
        ConfigurationError: the plan or the folder cannot be used.
        LoadFailed: the client ended without a result, or took longer than `timeout_seconds`.
        MemosError: the server does not answer.
    """
    _check(plan, tokenizer)
    body = {
        "url": url.rstrip("/"),
        "model": model,
        "tokenizer": str(tokenizer),
        "seed": plan.seed,
        "request_rate": plan.request_rate,
        "concurrency": plan.concurrency,
        "limit_seconds": plan.limit_seconds,
        "chats": [asdict(chat) for chat in plan.chats],
    }
    before = read_metrics(url).by_label(*_SOURCES)
    result = _ask_client(body, timeout_seconds)
    return _run_from(plan, result, read_metrics(url).by_label(*_SOURCES) - before)


def _check(plan: LoadPlan, tokenizer: Path) -> None:
    if not plan.chats:
        raise ConfigurationError("a load plan needs chats")
    if plan.concurrency < 1 or not plan.request_rate > 0 or not plan.limit_seconds > 0:
        raise ConfigurationError("concurrency, request rate and limit must be more than 0")
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise ConfigurationError(f"{tokenizer} holds no tokenizer; name the model's folder")


def _ask_client(body: Mapping[str, object], timeout_seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="memos-load-") as name:
        folder = Path(name)
        plan_path, result_path = folder / "plan.json", folder / "result.json"
        plan_path.write_text(json.dumps(body))
        with (folder / "log").open("w+") as log:
            try:
                ended = subprocess.run(
                    [sys.executable, "-m", _CLIENT, str(plan_path), str(result_path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(os.environ),
                    timeout=timeout_seconds,
                    check=False,
                )
                why = f"ended with exit code {ended.returncode}"
            except subprocess.TimeoutExpired:
                why = f"was not done after {timeout_seconds:g} s"
            if result_path.exists():
                result: dict[str, Any] = json.loads(result_path.read_text())
                return result
            log.seek(0)
            tail = "".join(log.readlines()[-_LOG_TAIL_LINES:])
        raise LoadFailed(f"the load client {why}:\n{tail}")


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the shell's that would send the chats elsewhere, or somebody's key along."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.lower().endswith("_proxy") and name != "OPENAI_API_KEY"
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _run_from(plan: LoadPlan, result: Mapping[str, Any], sources: Mapping[str, int]) -> LoadRun:
    pairs = zip(plan.chats, result["requests"], strict=True)
    return LoadRun(
        concurrency=plan.concurrency,
        request_rate=plan.request_rate,
        limit_seconds=plan.limit_seconds,
        duration_seconds=result["duration_seconds"],
        reported_goodput_per_second=result["goodput_per_second"],
        output_tokens_per_second=result["output_tokens_per_second"],
        vllm=result["vllm"],
        requests=tuple(_request_from(chat, sample) for chat, sample in pairs),
        sources=dict(sources),
    )


def _request_from(chat: PlannedChat, sample: Mapping[str, Any]) -> LoadRequest:
    # Of a traceback the last line says what happened.
    said = str(sample["error"]).strip().rpartition("\n")[2]
    if not said and sample["output_tokens"] < chat.output_tokens:
        said = (
            f"the answer broke off after {sample['output_tokens']} of {chat.output_tokens} tokens"
        )
    fields = {**sample, "gap_seconds": tuple(sample["gap_seconds"]), "error": said or None}
    return LoadRequest(cube=chat.cube, **fields)
