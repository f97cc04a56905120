"""What a server must not be started with, because it would lead past the keys.

Looked at and left alone: `--uds` (who may open the socket's file is the file system's business),
`--root-path` (the guard strips it as the router does), `--data-parallel-multi-port-external-lb`
(each of its servers has the guard, its supervisor tells only whether they are ready), `--headless`
and the ports between nodes (vLLM's own advice holds: a private network), `--enable-scale-out`,
profiler and VLLM_SERVER_DEV_MODE routes (behind the guard, most of them for administrators), other
`--middleware` (behind the guard too), the operator's own code (SageMaker hooks, tool parsers).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memos_vllm.api.model_access import ADAPTER_PREFIX, is_adapter
from memos_vllm.config import VllmSwitches
from memos_vllm.engine.names import MIDDLEWARE
from memos_vllm.errors import ConfigurationError

# Sockets that only this machine's own processes reach, by the rights of a file or not at all.
_PRIVATE_ENDPOINTS = ("ipc://", "inproc://")


def refuse_open_doors(args: Namespace, *, data_dir: Path, has_keys: Callable[[], bool]) -> None:
    """Refuse to serve past the keys, and to anyone before there is one.

    Args:
        args: of `vllm serve`.
        has_keys: whether the catalog has ever had a key; asked only where it matters.
    Raises:
        ConfigurationError: the reason, and what to do instead.
    """
    for refuse in (_refuse_other_keys, _refuse_other_servers, _refuse_kv_events, _refuse_names):
        refuse(args)
    _refuse_files(args, data_dir)
    if getattr(args, "uds", None) is None and not is_loopback(args.host) and not has_keys():
        shown = args.host or "every address (vLLM's default)"
        raise ConfigurationError(
            f"memory has no keys yet, so anyone who reaches the server could read it: it serves "
            f"only this machine, not {shown}; pass --host 127.0.0.1, or make a key with "
            "`memos-vllm keys create NAME` first"
        )


def guard_outermost(args: Namespace) -> None:
    """Make the guard the first that sees a request: vLLM puts each --middleware around the ones
    before it, and all of them around its own.
    """
    others = [name for name in getattr(args, "middleware", None) or () if name != MIDDLEWARE]
    args.middleware = [*others, MIDDLEWARE]


def is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _refuse_other_keys(args: Namespace) -> None:
    if getattr(args, "api_key", None):
        raise ConfigurationError(
            "--api-key guards only part of vLLM's routes and knows one principal; leave it out and "
            "make keys with `memos-vllm keys create NAME`"
        )
    switches = VllmSwitches()
    if switches.api_key is not None and switches.api_key.get_secret_value():
        raise ConfigurationError(
            "VLLM_API_KEY would refuse memory's own keys on part of vLLM's routes; unset it and "
            "make keys with `memos-vllm keys create NAME`"
        )
    if switches.log_responses:
        raise ConfigurationError(
            "VLLM_DEBUG_LOG_API_SERVER_RESPONSE would write every answer, memories and new keys "
            "among them, to the log; unset it"
        )


def _refuse_other_servers(args: Namespace) -> None:
    if getattr(args, "grpc_port", None) is not None or getattr(args, "grpc", False):
        raise ConfigurationError("gRPC would go past the checks on memory; leave it out")
    if VllmSwitches().rust_frontend:
        raise ConfigurationError(
            "VLLM_USE_RUST_FRONTEND starts a server that knows neither keys nor memory; unset it"
        )


def _refuse_kv_events(args: Namespace) -> None:
    """They tell the token ids of every prompt, and the salts that keep cubes apart."""
    config: Any = getattr(args, "kv_events_config", None)
    if config is None or not config.enable_kv_cache_events or config.publisher == "null":
        return
    endpoints = [config.endpoint, *filter(None, [config.replay_endpoint])]
    if not all(endpoint.startswith(_PRIVATE_ENDPOINTS) for endpoint in endpoints):
        raise ConfigurationError(
            "KV events tell everybody's prompts, and who listens needs no key; leave "
            "--kv-events-config out, or give it ipc:// endpoints"
        )


def _refuse_names(args: Namespace) -> None:
    for name in args.served_model_name or [getattr(args, "model_tag", None) or args.model]:
        if is_adapter(name):
            raise ConfigurationError(
                f"names that start with '{ADAPTER_PREFIX}' are kept for adapters of memory; give "
                "another --served-model-name"
            )


def _refuse_files(args: Namespace, data_dir: Path) -> None:
    allowed = getattr(args, "allowed_local_media_path", None)
    if not allowed:
        return
    folder, data = Path(os.path.realpath(allowed)), Path(os.path.realpath(data_dir))
    if folder == data or folder in data.parents or data in folder.parents:
        raise ConfigurationError(
            "--allowed-local-media-path lets every request read files there, and memory's own "
            f"({data_dir}) are among them; choose another folder"
        )
