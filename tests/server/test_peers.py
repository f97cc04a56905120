"""The peers of the benchmarks on a real vLLM: what they give back is what they have stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from memos_vllm.bench.peers import ExampleConnector, LMCache, Peer, PeerServer
from memos_vllm.bench.streams import Timed, timed_chat
from memos_vllm.config import default_peers_dir
from memos_vllm.process import family_of

BLOCK_TOKENS = 128
OPTIONS = (
    *("--served-model-name", "smol", "--enable-prompt-tokens-details", "--enforce-eager"),
    *("--num-gpu-blocks-override", "120", "--max-num-seqs", "8"),
    # In bfloat16 a prefill may differ from itself at a near-tie.
    *("--dtype", "float32"),
)
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
STORY = " ".join(f"On day {day} the ship carried {day * 7} barrels." for day in range(150))


@pytest.mark.parametrize("peer", [LMCache(), ExampleConnector()], ids=lambda peer: peer.name)
def test_a_peer_gives_back_what_vllm_has_forgotten(
    peer: Peer, model_folder: Path, tmp_path: Path
) -> None:
    if isinstance(peer, LMCache):
        built = peer.environment.folder_in(default_peers_dir())
        if not peer.environment.is_ready(built):
            pytest.skip("LMCache is downloaded by the benchmark only, not by a test")
    server = peer.server(
        str(model_folder),
        python=peer.prepare(),
        options=OPTIONS,
        environment=ENVIRONMENT,
        folder=tmp_path,
    )
    with server, httpx.Client(base_url=server.url, timeout=120.0, trust_env=False) as client:
        computed = _ask(client)
        _check_salt(peer, server, client)
        whole_blocks = computed.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        for _ in range(2):
            server.forget_prefixes()
            counted, own = server.prompt_tokens(), server.store_tokens()
            loaded = _ask(client)
            used = server.prompt_tokens().since(counted)
            assert used.hit_fault(at_least=whole_blocks - BLOCK_TOKENS) is None
            assert loaded.cached_tokens == used.store
            assert server.store_tokens() - own >= used.store
            assert loaded.text == computed.text
        family = family_of(server.engine.pid)
        segments = [path for one in server.processes for path in one.shared_memory()]
        assert segments
    assert [one for one in family if one.is_alive()] == []
    assert [path for path in segments if path.exists()] == []


def _check_salt(peer: Peer, server: PeerServer, client: httpx.Client) -> None:
    """Whether the same tokens under another salt are found is what the peer is said to do."""
    server.forget_prefixes()
    counted = server.prompt_tokens()
    _ask(client, cache_salt="somebody-else")
    used = server.prompt_tokens().since(counted)
    assert (used.store == 0) == peer.salted


def _ask(client: httpx.Client, **body: Any) -> Timed:
    messages = [{"role": "user", "content": f"{STORY} How many barrels on day 100?"}]
    return timed_chat(client, messages, model="smol", max_tokens=16, **body)
