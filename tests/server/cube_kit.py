"""What the server tests do with cubes over HTTP, in few words."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from memos_vllm.process import ServerProcess

BLOCK_TOKENS = 128
QUESTION = "When does the desk open?"


def note(topic: str, *, lines: int = 6) -> str:
    """A memory of about 25 tokens a line: six lines fill more than one block."""
    return f"About {topic}. " + " ".join(
        f"The {topic} desk number {line} opens at {line} o'clock." for line in range(1, lines + 1)
    )


def fresh_id(topic: str) -> str:
    """A cube id that no other test uses."""
    return f"{topic}-{uuid.uuid4().hex[:8]}"


def notes_of(cube_id: str, *topics: str, lines: int = 6) -> list[str]:
    """One text per topic; the cube's id in each keeps its tokens apart from other tests'."""
    return [note(f"{topic} of {cube_id}", lines=lines) for topic in topics]


def make_cube(
    http: httpx.Client,
    topic: str = "cube",
    *,
    texts: Sequence[str] | None = None,
    promote: bool = True,
    cube_id: str | None = None,
) -> tuple[str, list[str]]:
    """Make a cube of three notes (about 500 tokens) and promote them; its id and theirs."""
    cube_id = cube_id or fresh_id(topic)
    created = http.post("/v1/memcubes", json={"id": cube_id})
    assert created.status_code == 201, created.text
    given = list(texts) if texts is not None else notes_of(cube_id, "red", "green", "blue")
    ids = add_memories(http, cube_id, given)
    if promote:
        promote_all(http, cube_id)
    return cube_id, ids


def add_memories(http: httpx.Client, cube_id: str, texts: Sequence[str]) -> list[str]:
    added = http.post(
        f"/v1/memcubes/{cube_id}/memories", json={"memories": [{"text": text} for text in texts]}
    )
    assert added.status_code == 201, added.text
    return [memory["id"] for memory in added.json()["data"]]


def promote_all(http: httpx.Client, cube_id: str) -> dict[str, Any]:
    """Promote every memory and wait for the bake; the job."""
    return move(http, cube_id, "promote", to="activation", memory_ids="all", wait=True)


def move(http: httpx.Client, cube_id: str, verb: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/memcubes/{cube_id}/{verb}", json=body)
    assert answer.status_code == (200 if body.get("wait") else 202), answer.text
    job: dict[str, Any] = answer.json()
    if body.get("wait"):
        assert job["state"] == "succeeded", job
    return job


def keys_command(data_dir: Path, *arguments: str) -> dict[str, Any]:
    """`memos-vllm keys` on the data folder of a server, which may run."""
    command = [sys.executable, "-m", "memos_vllm.cli.main", "keys", *arguments, "--json"]
    done = subprocess.run(
        [*command, "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def cube_state(http: httpx.Client, cube_id: str) -> dict[str, Any]:
    answer = http.get(f"/v1/memcubes/{cube_id}")
    assert answer.status_code == 200, answer.text
    cube: dict[str, Any] = answer.json()
    return cube


def chat_body(
    memcube_id: object = None, question: str = QUESTION, **options: Any
) -> dict[str, Any]:
    """A greedy chat of a few tokens; `memcube_id` is left out when None."""
    cubes = {} if memcube_id is None else {"memcube_id": memcube_id}
    messages = [{"role": "user", "content": question}]
    base = {"model": "smol", "messages": messages, "max_tokens": 4, "temperature": 0}
    return {**base, **cubes, **options}


def ask(http: httpx.Client, memcube_id: object = None, **options: Any) -> dict[str, Any]:
    """A chat that must succeed; the reply."""
    answer = http.post("/v1/chat/completions", json=chat_body(memcube_id, **options))
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def refused(http: httpx.Client, memcube_id: object = None, **options: Any) -> dict[str, Any]:
    """A chat that must be a 400; the error."""
    answer = http.post("/v1/chat/completions", json=chat_body(memcube_id, **options))
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def stream(http: httpx.Client, memcube_id: object = None, **options: Any) -> list[dict[str, Any]]:
    """A streamed chat that must succeed; its chunks, without the closing [DONE]."""
    answer = http.post("/v1/chat/completions", json=chat_body(memcube_id, stream=True, **options))
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def activation(reply: dict[str, Any]) -> dict[str, Any]:
    used: dict[str, Any] = reply["memos"]["activation"]
    return used


def text_of(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def prompt_of(http: httpx.Client, memcube_id: object = None, **options: Any) -> str:
    """The prompt that the model is given for a chat, as text."""
    reply = ask(http, memcube_id, return_token_ids=True, max_tokens=1, **options)
    return detokenize(http, reply["prompt_token_ids"])


def detokenize(http: httpx.Client, token_ids: Sequence[int]) -> str:
    answer = http.post("/detokenize", json={"model": "smol", "tokens": list(token_ids)})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt"])


def plainly_cached(http: httpx.Client, token_ids: Sequence[int]) -> int:
    """How many tokens a plain completion of exactly these tokens finds in the prefix cache."""
    answer = http.post(
        "/v1/completions",
        json={"model": "smol", "prompt": list(token_ids), "max_tokens": 1, "temperature": 0},
    )
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """A metric's value, summed over the label sets that hold these labels; 0 when absent."""
    total = 0.0
    for line in http.get("/metrics").text.splitlines():
        if not line.startswith((name + " ", name + "{")):
            continue
        if all(f'{label}="{value}"' in line for label, value in labels.items()):
            total += float(line.rpartition(" ")[2])
    return total


def drop_prefix_cache(http: httpx.Client) -> None:
    """Forget all resident KV; wants a server in vLLM's development mode."""
    answer = http.post("/reset_prefix_cache")
    assert answer.status_code == 200, answer.text


def shards_of(data_dir: Path, scope_or_key: str | None = None) -> list[Path]:
    """The artifact data files of a data folder."""
    found = sorted((data_dir / "artifacts" / "data").rglob("*.safetensors"))
    return [path for path in found if scope_or_key is None or scope_or_key in path.name]


@contextmanager
def client_of(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=180.0, trust_env=False) as client:
        yield client
