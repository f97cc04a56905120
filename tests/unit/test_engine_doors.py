"""What leads past the keys is refused at start; every route of vLLM's real app is closed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from catalog_kit import ADMIN, Desk, open_desk
from fastapi import FastAPI
from vllm.config import ProfilerConfig
from vllm.config.kv_events import KVEventsConfig
from vllm.entrypoints.launchers.app import build_app

from memos_vllm.api.authentication import STATE, Authenticator
from memos_vllm.api.middleware import MemosGuard
from memos_vllm.api.route_access import (
    ADMINISTRATOR_PATHS,
    HEALTH_PATH,
    PRINCIPAL_PATHS,
    Audience,
    audience,
)
from memos_vllm.control.keys import keys_exist
from memos_vllm.domain.access import PrincipalKind
from memos_vllm.domain.keys import draw_key
from memos_vllm.engine.doors import guard_outermost, refuse_open_doors
from memos_vllm.engine.names import MIDDLEWARE
from memos_vllm.engine.serve import _parse
from memos_vllm.errors import ConfigurationError

# All that vLLM can be asked to do; a model that does them all would have all routes.
TASKS: Any = ("generate", "transcription", "realtime", "render")


def arguments(**changes: Any) -> Namespace:
    plain = {"host": "127.0.0.1", "served_model_name": None, "model": "some/model"}
    return Namespace(**{**plain, **changes})


def refuse(*, has_keys: bool = False, data_dir: Path = Path("/data"), **changes: Any) -> None:
    refuse_open_doors(arguments(**changes), data_dir=data_dir, has_keys=lambda: has_keys)


# --- at start --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_loopback_host_needs_no_key_and_the_catalog_is_not_asked(host: str) -> None:
    def asked() -> bool:
        raise AssertionError("asked")

    refuse_open_doors(arguments(host=host), data_dir=Path("/data"), has_keys=asked)


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.x"])
def test_another_host_needs_a_key(host: str | None) -> None:
    with pytest.raises(ConfigurationError, match=r"memos-vllm keys create NAME"):
        refuse(host=host)
    refuse(host=host, has_keys=True)


def test_the_first_key_opens_other_hosts_before_any_server_ran(tmp_path: Path) -> None:
    with open_desk(tmp_path, cube=False) as desk:
        assert not keys_exist(desk.url)
        desk.mos.create_key(ADMIN, "ops", draw_key().digest)
        assert keys_exist(desk.url)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"api_key": ["secret"]}, "--api-key guards only part"),
        ({"grpc": True}, "gRPC"),
        ({"grpc_port": 0}, "gRPC"),
        ({"kv_events_config": KVEventsConfig(enable_kv_cache_events=True)}, "KV events"),
        (
            {
                "kv_events_config": KVEventsConfig(
                    enable_kv_cache_events=True,
                    endpoint="ipc:///run/events",
                    replay_endpoint="tcp://127.0.0.1:1",
                )
            },
            "KV events",
        ),
        ({"served_model_name": ["smol", "memos-x"]}, "kept for adapters"),
        ({"model": "memos-x"}, "kept for adapters"),
        ({"allowed_local_media_path": "/"}, "--allowed-local-media-path"),
        ({"allowed_local_media_path": "/data"}, "--allowed-local-media-path"),
        ({"allowed_local_media_path": "/data/artifacts"}, "--allowed-local-media-path"),
        ({"allowed_local_media_path": "/x/../data"}, "--allowed-local-media-path"),
    ],
)
def test_what_leads_past_the_keys_is_refused_even_with_keys(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        refuse(has_keys=True, **changes)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("VLLM_API_KEY", "secret", True),
        ("VLLM_API_KEY", "", False),
        ("VLLM_USE_RUST_FRONTEND", "1", True),
        ("VLLM_USE_RUST_FRONTEND", "0", False),
        ("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "True", True),
        ("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "false", False),
    ],
)
def test_vllms_own_switches_past_the_keys_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    monkeypatch.setenv(name, value)
    if not refused:
        refuse()
        return
    with pytest.raises(ConfigurationError, match=name) as caught:
        refuse()
    assert "secret" not in str(caught.value)


def test_harmless_neighbours_of_the_doors_are_left_alone() -> None:
    private = KVEventsConfig(enable_kv_cache_events=True, endpoint="ipc:///run/events")
    refuse(kv_events_config=private)
    refuse(kv_events_config=KVEventsConfig())
    refuse(allowed_local_media_path="/database", uds="/run/memos.sock", host=None)


@pytest.mark.parametrize("given", [[], ["a.B"], [MIDDLEWARE, "a.B"], ["a.B", MIDDLEWARE]])
def test_the_guard_is_around_every_other_middleware(given: list[str]) -> None:
    args = Namespace(middleware=given)
    guard_outermost(args)
    # vLLM adds them in this order, each around the ones before.
    assert args.middleware == [*[name for name in given if name != MIDDLEWARE], MIDDLEWARE]


# --- vLLM's real app -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, Desk]]:
    """The app as vLLM builds it, with the routes of every option and of the development mode."""
    with pytest.MonkeyPatch.context() as patch, open_desk(tmp_path_factory.mktemp("real")) as desk:
        for name in (
            "VLLM_SERVER_DEV_MODE",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            "VLLM_ENABLE_COHERE_API",
        ):
            patch.setenv(name, "1")
        patch.setenv("VLLM_PLUGINS", "memos")
        options = (
            "--enable-scale-out",
            "--enable-tokenizer-info-endpoint",
            "--enable-offline-docs",
        )
        _, args = _parse(["some-model", *options])
        args.enable_fault_tolerance = True
        args.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir="/tmp")
        app = build_app(args, TASKS, None)
        # The plugin that vLLM loaded waits for an engine; the catalog is all that keys need.
        setattr(app.state, STATE, Authenticator(lambda: desk.mos, is_down=lambda: False))
        yield app, desk


def every_path(routes: Any, prefix: str = "") -> set[str]:
    """Path templates of routes, those of routers within routers too."""
    paths: set[str] = set()
    for route in routes:
        path = prefix + (getattr(route, "path", None) or "")
        if getattr(route, "endpoint", None) is None and getattr(route, "routes", None):
            paths |= every_path(route.routes, path)
        else:
            paths.add(path)
    return paths


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://t")


def in_table(path: str) -> bool:
    """Whether somebody has decided who may use this route."""
    return (
        path in ADMINISTRATOR_PATHS
        or path == HEALTH_PATH
        or audience(path, "GET") is Audience.PRINCIPALS
    )


def test_the_guard_is_outermost_in_the_real_app(real: tuple[FastAPI, Desk]) -> None:
    kinds = [middleware.cls for middleware in real[0].user_middleware]
    assert kinds[0] is MemosGuard
    assert kinds.count(MemosGuard) == 1


def test_every_route_of_the_real_app_is_in_the_table(real: tuple[FastAPI, Desk]) -> None:
    paths = every_path(real[0].router.routes)
    assert {"/health", "/v1/models", "/sleep", "/metrics", "/v1/realtime", "/adapters"} <= paths
    # One that fails here is new in this vLLM: it is for administrators until it is in the table.
    assert sorted(path for path in paths if not in_table(path)) == []
    assert not ADMINISTRATOR_PATHS & PRINCIPAL_PATHS


def test_a_route_that_nobody_has_looked_at_would_fail_the_test_and_is_closed() -> None:
    assert not in_table("/of/a/later/vllm")
    assert audience("/of/a/later/vllm", "GET") is Audience.ADMINISTRATORS


async def test_every_route_of_the_real_app_needs_a_key(real: tuple[FastAPI, Desk]) -> None:
    app, desk = real
    if not desk.mos.has_keys():
        desk.mos.create_key(ADMIN, "ops", draw_key().digest)
    user = draw_key()
    desk.mos.create_key(ADMIN, "alice", user.digest)
    tried = 0
    async with client_of(app) as client:
        for path in sorted(every_path(app.router.routes)):
            filled = path.replace("{", "").replace("}", "")
            if path == HEALTH_PATH:
                continue
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
                reply = await client.request(method, filled)
                assert reply.status_code == 401, (method, path)
                tried += 1
            if path in ADMINISTRATOR_PATHS:
                sent = {"Authorization": f"Bearer {user.token}"}
                reply = await client.post(filled, headers=sent, json={})
                assert reply.status_code == 403, path
    assert tried > 300


async def test_models_of_ours_are_listed_for_administrators_only(
    real: tuple[FastAPI, Desk],
) -> None:
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

    class Models:
        async def show_available_models(self) -> ModelList:
            names = ("smol", "own-lora", "memos-acme")
            return ModelList(data=[ModelCard(id=name) for name in names])

    app, desk = real
    app.state.openai_serving_models = Models()
    admin, agent = draw_key(), draw_key()
    desk.mos.create_key(ADMIN, "root", admin.digest, admin=True)
    desk.mos.create_key(ADMIN, "agent", agent.digest, kind=PrincipalKind.AGENT)
    async with client_of(app) as client:
        for key, expected in (
            (admin, ["smol", "own-lora", "memos-acme"]),
            (agent, ["smol", "own-lora"]),
        ):
            sent = {"Authorization": f"Bearer {key.token}"}
            listed = (await client.get("/v1/models", headers=sent)).json()["data"]
            assert [card["id"] for card in listed] == expected
