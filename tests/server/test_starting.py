"""Starting a server: what the user set is kept, what would open memory to others is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cube_kit import (
    activation,
    ask,
    chat_body,
    client_of,
    cube_state,
    keys_command,
    make_cube,
    metric,
    promote_all,
)

from memos_vllm.engine.serve import main
from memos_vllm.process import ServerFailed, ServerProcess

OWN_BLOCKS = 100

# A plugin and a middleware of the user's, as an installed distribution would bring them.
OWN_MODULE = """
import os, pathlib

def register():
    pathlib.Path(os.environ["OWN_MARKER"]).touch()

class Stamp:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def stamped(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-own", b"stamped")]
            await send(message)

        await self.app(scope, receive, stamped if scope["type"] == "http" else send)
"""


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "serves only this machine, not 0.0.0.0"),
        (["--host", "::"], "serves only this machine, not ::"),
        (["--host", "example.org"], "serves only this machine"),
        (["--api-key", "secret"], "--api-key guards only part of vLLM's routes"),
        (["--kv-events-config", '{"enable_kv_cache_events":true}'], "KV events tell everybody's"),
        (["--allowed-local-media-path", "/"], "--allowed-local-media-path lets every request"),
        (["--grpc"], "gRPC would go past the checks on memory"),
        (["--residency-fraction", "1.5"], "--residency-fraction"),
        (["--artifact-budget-gib", "0"], "--artifact-budget-gib"),
        (["--artifact-url", "s3://bucket/kv"], "--artifact-url: KV is read through the page cache"),
        (
            ["--kv-transfer-config", '{"kv_connector":"OffloadingConnector","kv_role":"kv_both"}'],
            "the KV connector OffloadingConnector would take the place of memory's",
        ),
        (["--kv-offloading-size", "1"], "name both in --kv-transfer-config"),
    ],
    ids=lambda value: "-".join(value)[:24] if isinstance(value, list) else "",
)
def test_what_memory_cannot_be_served_with_is_refused_with_the_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")

    code = main(["some-model", "--data-dir", str(tmp_path / "data"), *options])

    said = capsys.readouterr().err
    assert (code, said.startswith("memos-vllm serve: ")) == (2, True)
    assert reason in said
    assert not (tmp_path / "data").exists()


def test_the_command_line_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "memos_vllm.cli.main", "serve", "some-model"),
            *("--host", "0.0.0.0", "--data-dir", str(tmp_path / "data")),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 2
    assert "pass --host 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_option_that_vllm_does_not_know_is_vllms_own_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")

    with pytest.raises(SystemExit) as stopped:
        main(["some-model", "--no-such-option", "1"])

    assert stopped.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


# --- what the user set is kept, and two API servers ----------------------------------------


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_things.py").write_text(OWN_MODULE, encoding="utf-8")
    installed = folder / "own_things-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own-things\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nown = own_things:register\n"
    )
    return folder


@pytest.fixture(scope="module")
def customised(
    start_server: Callable[..., ServerProcess], own_folder: Path
) -> Iterator[ServerProcess]:
    connector = {
        "kv_connector": "MemCubeConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"residency_fraction": 0.5},
    }
    server = start_server(
        "--middleware",
        "own_things.Stamp",
        "--served-model-name",
        "smol",
        "second-name",
        "--kv-transfer-config",
        json.dumps(connector),
        "--num-gpu-blocks-override",
        str(OWN_BLOCKS),
        "--api-server-count",
        "2",
        "--enable-prompt-tokens-details",
        data_dir=own_folder / "data",
        environment={
            "PYTHONPATH": os.pathsep.join([str(own_folder), os.environ.get("PYTHONPATH", "")]),
            "OWN_MARKER": str(own_folder / "marker"),
            "VLLM_PLUGINS": "own",
        },
    )
    yield server
    server.stop()


@pytest.fixture
def http(customised: ServerProcess) -> Iterator[httpx.Client]:
    with client_of(customised) as client:
        yield client


def anew(server: ServerProcess, path: str) -> dict[str, Any]:
    """GET on a connection of its own, which any of the API servers may take."""
    with client_of(server) as client:
        answer: dict[str, Any] = client.get(path).json()
        return answer


def test_the_users_middleware_plugins_names_and_connector_settings_are_kept(
    http: httpx.Client, own_folder: Path
) -> None:
    listed = http.get("/v1/models")
    residency = http.get("/v1/memos/status").json()["residency"]
    cube_id, _ = make_cube(http, "own")

    assert listed.headers["x-own"] == "stamped"
    assert [model["id"] for model in listed.json()["data"]] == ["smol", "second-name"]
    assert (own_folder / "marker").exists()
    for name in ("smol", "second-name"):
        assert activation(ask(http, cube_id, model=name))["tokens"] > 0
    assert residency["block_size"] == 128
    budgets = {
        line.rpartition(" ")[2]
        for line in http.get("/metrics").text.splitlines()
        if line.startswith("memos_residency_budget_blocks{")
    }
    # Half of the pool, less the block that vLLM keeps empty.
    assert {float(budget) for budget in budgets} == {(OWN_BLOCKS - 1) // 2}


def test_the_guard_stands_before_both_api_servers(customised: ServerProcess) -> None:
    for _ in range(8):
        with client_of(customised) as client:
            answer = client.post(
                "/v1/completions", json={"model": "smol", "prompt": "Hi", "memcube_id": "x"}
            )
            assert answer.status_code == 400


def test_two_api_servers_run_each_job_once_and_answer_alike(
    http: httpx.Client, customised: ServerProcess
) -> None:
    cubes = [make_cube(http, "shared", promote=False)[0] for _ in range(4)]

    def bake(cube_id: str) -> str:
        with client_of(customised) as client:
            return str(promote_all(client, cube_id)["id"])

    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(bake, cubes))
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(lambda cube: cube_via_another(customised, cube), cubes * 2))
    sources = set()
    for cube_id in cubes * 2:
        with client_of(customised) as client:
            sources.add(activation(ask(client, cube_id))["source"])

    assert states == ["ready"] * 8
    assert sources == {"resident"}
    for cube_id, job_id in zip(cubes, jobs, strict=True):
        ends = [
            entry["details"]
            for entry in http.get(f"/v1/memcubes/{cube_id}/audit").json()["data"]
            if entry["action"] == "job.finish" and entry["subject"] == job_id
        ]
        assert ends == [{"state": "succeeded", "attempts": 1}]
    assert anew(customised, "/v1/audit/verify")["ok"] is True
    assert metric(http, "memos_requests_total", kind="resident") >= 8


def cube_via_another(server: ServerProcess, cube_id: str) -> str:
    with client_of(server) as client:
        return str(cube_state(client, cube_id)["activation"]["state"])


def test_an_edit_through_one_api_server_is_seen_by_the_other_at_once(
    http: httpx.Client, customised: ServerProcess
) -> None:
    cube_id, (first, *_) = make_cube(http, "seen")
    for _ in range(4):
        with client_of(customised) as client:
            ask(client, cube_id, max_tokens=1)

    http.patch(f"/v1/memcubes/{cube_id}/memories/{first}", json={"text": "Short now."})

    versions = set()
    tokens = set()
    for _ in range(6):
        with client_of(customised) as client:
            reply = ask(client, cube_id, max_tokens=1)
            versions.add(reply["memos"]["cubes"][0]["version"])
            tokens.add(activation(reply)["tokens"])
    assert len(versions) == len(tokens) == 1


# --- keys, which close that server ---------------------------------------------------------


def test_keys_made_on_the_data_folder_close_both_api_servers(
    http: httpx.Client, customised: ServerProcess, own_folder: Path
) -> None:
    theirs, _ = make_cube(http, "before-keys")
    admin = keys_command(own_folder / "data", "create", "ops")
    alice = keys_command(own_folder / "data", "create", "alice")

    def statuses(path: str, key: str | None = None) -> set[int]:
        """On connections of their own, which both API servers take."""
        sent = {} if key is None else {"Authorization": f"Bearer {key}"}
        found = set()
        for _ in range(8):
            with client_of(customised) as client:
                found.add(client.get(path, headers=sent).status_code)
        return found

    assert (admin["admin"], alice["admin"]) == (True, False)
    for path in ("/v1/models", "/metrics", "/docs", f"/v1/memcubes/{theirs}"):
        assert statuses(path) == {401}
        assert statuses(path, "mos_wrong") == {401}
        assert statuses(path, admin["key"]) == {200}
    assert statuses("/health") == {200}
    assert statuses("/v1/models", alice["key"]) == {200}
    assert statuses(f"/v1/memcubes/{theirs}", alice["key"]) == {404}
    assert statuses("/is_scaling_elastic_ep", alice["key"]) == {403}

    with client_of(customised) as client:
        client.headers["Authorization"] = f"Bearer {alice['key']}"
        mine, _ = make_cube(client, "alices")
        assert activation(ask(client, mine))["tokens"] > 0
        unseen = client.post("/v1/chat/completions", json=chat_body(theirs))
        assert unseen.status_code == 404
        body = {"prompt": "Hi", "max_tokens": 1}
        said = set()
        for name in ("nobody-x", "memos-x"):
            # vLLM takes the model of /invocations from this header only.
            sent = {"X-Amzn-SageMaker-Adapter-Identifier": name}
            for refused in (
                client.post("/v1/completions", json={**body, "model": name}),
                client.post("/invocations", json=body, headers=sent),
            ):
                said.add((refused.status_code, refused.text.replace(name, "it")))
        assert [status for status, _ in said] == [404], said

    keys_command(own_folder / "data", "revoke", alice["prefix"])
    assert statuses("/v1/models", alice["key"]) == {401}
    assert statuses("/v1/models", admin["key"]) == {200}
    log = customised.log_path.read_text(errors="replace")
    assert all(key["key"] not in log for key in (admin, alice))


# --- by hand -------------------------------------------------------------------------------


def test_the_plugin_in_a_server_without_its_control_plane_refuses_to_start(
    start_server: Callable[..., ServerProcess],
    customised: ServerProcess,
    tmp_path: Path,
) -> None:
    customised.stop()
    connector = {
        "kv_connector": "MemCubeConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"data_dir": str(tmp_path)},
    }
    with pytest.raises(ServerFailed, match="start the server with it instead of `vllm serve`"):
        start_server(
            "--kv-transfer-config",
            json.dumps(connector),
            by_hand=True,
            environment={"VLLM_PLUGINS": "memos"},
        )
