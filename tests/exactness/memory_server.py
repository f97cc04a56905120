"""A real server with cubes, and what the exactness tests do to it besides chatting."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from prompts import NOTES, QUESTIONS, question_messages

from memos_vllm.bench.yardstick import Asker, Chat, fresh_salt
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.memory import NewMemory, Tier
from memos_vllm.process import ServerProcess

# Added to every server: replies tell what was cached, and the prefix cache can be reset.
OPTIONS = ("--enable-prompt-tokens-details", "--max-model-len", "2048")
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}

_REQUEST_SECONDS = 600.0
# Two prompts of a fifth of the pool at once: the flood turns the pool over, but does not need
# all of it at any time, since serving would then rightly take memory's blocks too.
_FLOOD_CONCURRENCY = 2
_FLOOD_PROMPT_FRACTION = 5
_STORE_SECONDS = 60.0


class MemoryServer:
    """A server that runs, its data folder and a client of it.

    Attributes:
        client: bound to the server's address, which a restart keeps.
        data_dir: the server's.
    """

    def __init__(self, process: ServerProcess, data_dir: Path) -> None:
        self._process = process
        self.data_dir = data_dir
        self.client = httpx.Client(base_url=process.url, trust_env=False, timeout=_REQUEST_SECONDS)
        self.asker = Asker(self.client)

    def close(self) -> None:
        self.client.close()
        self._process.stop()

    def kill_and_restart(self) -> None:
        """Kill -9 every process of the server, and start it again on the same data."""
        self._process.kill()
        self._process.start()

    def bake_cube(self, cube_id: str) -> None:
        """Make a cube with the notes, and wait until its prefix is in the store."""
        self._post("/v1/memcubes", {"id": cube_id})
        memories = [{"text": text} for text in NOTES]
        self._post(f"/v1/memcubes/{cube_id}/memories", {"memories": memories})
        promotion = {"to": "activation", "memory_ids": "all", "wait": True}
        self._post(f"/v1/memcubes/{cube_id}/promote", promotion)

    def wait_until_stored(self, num_artifacts: int) -> None:
        """Wait for saves that chats began: they end after the reply."""
        deadline = time.monotonic() + _STORE_SECONDS
        manifests = self.data_dir / "artifacts" / "manifests"
        while len(list(manifests.glob("*.json"))) < num_artifacts:
            assert time.monotonic() < deadline, "the prefixes were not saved in time"
            time.sleep(0.1)

    def reset_prefix_cache(self) -> None:
        """Drop every block from vLLM's prefix cache; the store keeps its artifacts."""
        self._post("/reset_prefix_cache", {})

    def flood(self, *, times_the_pool: int) -> None:
        """Send prompts that share nothing, in all some times what the KV pool holds."""
        pool = self.pool_tokens
        words = random.Random(pool)
        prompts = [
            [words.randrange(100, 40_000) for _ in range(pool // _FLOOD_PROMPT_FRACTION)]
            for _ in range(times_the_pool * _FLOOD_PROMPT_FRACTION + 1)
        ]
        with ThreadPoolExecutor(_FLOOD_CONCURRENCY) as threads:
            list(threads.map(lambda ids: self.asker.prefill(ids, salt=fresh_salt()), prompts))

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        labels = re.search(r"(?m)^vllm:cache_config_info\{(.*)\}", self._metrics())
        assert labels is not None
        sizes = dict(re.findall(r'(\w+)="([^"]*)"', labels[1]))
        return int(sizes["num_gpu_blocks"]) * int(sizes["block_size"])

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        values = re.findall(rf"(?m)^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self._metrics())
        assert values, f"{name} is not in /metrics"
        return sum(map(float, values))

    def _metrics(self) -> str:
        return self.client.get("/metrics").raise_for_status().text

    def _post(self, path: str, body: dict[str, Any]) -> None:
        reply = self.client.post(path, json=body)
        assert reply.is_success, reply.text


def write_unbaked_cubes(data_dir: Path, cube_ids: Sequence[str]) -> None:
    """Put cubes with the notes as activation memory into a catalog that no server uses yet.

    Their bake jobs are cancelled, so that the first chat with each has to compute its memory.
    """
    mos = Mos.open(f"sqlite:///{data_dir / 'catalog.sqlite'}")
    for cube_id in cube_ids:
        mos.create_cube(LOCAL_ADMIN, cube_id=cube_id)
        mos.add_memories(LOCAL_ADMIN, cube_id, [NewMemory(text) for text in NOTES])
        job = mos.promote(LOCAL_ADMIN, cube_id, to=Tier.ACTIVATION)
        mos.cancel_job(LOCAL_ADMIN, job.id)
    mos.close()


def memory_chats(*cube_ids: str) -> list[Chat]:
    """Each question, asked to a cube: the one named, or one of its own for each question."""
    cubes = cube_ids * len(QUESTIONS) if len(cube_ids) == 1 else cube_ids
    return [
        Chat(question_messages(question), {"memcube_id": cube})
        for question, cube in zip(QUESTIONS, cubes, strict=True)
    ]
