"""What the TTFT benchmark can be run beside: other ways to keep KV for the next request."""

from memos_vllm.bench.peers.environment import PeerEnvironment, PeerUnavailable
from memos_vllm.bench.peers.recipes import (
    ExampleConnector,
    LMCache,
    Peer,
    all_peers,
    ready_peers,
)
from memos_vllm.bench.peers.server import PeerServer, PromptTokens, parse_prompt_tokens

__all__ = [
    "ExampleConnector",
    "LMCache",
    "Peer",
    "PeerEnvironment",
    "PeerServer",
    "PeerUnavailable",
    "PromptTokens",
    "all_peers",
    "parse_prompt_tokens",
    "ready_peers",
]
