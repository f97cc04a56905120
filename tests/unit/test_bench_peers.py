"""The peers of the benchmarks: their environments, their processes, and what they count."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memos_vllm.bench.peers import (
    ExampleConnector,
    LMCache,
    Peer,
    PeerEnvironment,
    PeerServer,
    PeerUnavailable,
    PromptTokens,
    all_peers,
    parse_prompt_tokens,
    ready_peers,
)
from memos_vllm.errors import MemosError
from memos_vllm.process import ServerFailed

# --- environments -----------------------------------------------------------------------


def write_wheel(
    folder: Path, name: str, version: str, source: str, *, requires: str | None = None
) -> None:
    """A wheel of one module with that name."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={_record_digest(text)},{len(text)}\n" for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


def _record_digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks: no index, no settings of this machine."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tiny(*more: str, imports: tuple[str, ...] = ("tiny_peer",)) -> PeerEnvironment:
    return PeerEnvironment(
        name="tiny", requirements=("tiny_peer==1.5", *more), imports=imports, download_mb=1
    )


def said_by(python: Path, program: str) -> str:
    return subprocess.run(
        [str(python), "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "lock")


def test_a_peer_has_packages_of_its_own_above_the_present_ones(
    tmp_path: Path, wheels: Path
) -> None:
    # sortedcontainers is installed below, in another version.
    write_wheel(wheels, "tiny_peer", "1.5", "", requires="torch==0.0.1")
    write_wheel(wheels, "sortedcontainers", "999.0", "__version__ = '999.0'")
    environment = tiny("sortedcontainers==999.0")
    python = environment.prepare(root=tmp_path / "peers")
    program = (
        "import sys, tiny_peer, sortedcontainers, httpx;"
        "print(tiny_peer.__file__, sortedcontainers.__version__, httpx.__file__, sys.prefix)"
    )
    peer_file, version, present_file, prefix = said_by(python, program).split()
    folder = environment.folder_in(tmp_path / "peers")
    assert Path(peer_file).is_relative_to(folder)
    assert prefix == str(folder)
    assert version == "999.0"
    assert Path(present_file) == Path(importlib.util.find_spec("httpx").origin)  # type: ignore
    # Neither here, nor what it depends on there.
    assert importlib.util.find_spec("tiny_peer") is None
    installed = {path.name.partition("-")[0] for path in folder.rglob("*.dist-info")}
    assert installed == {"tiny_peer", "sortedcontainers"}


def test_packages_installed_for_editing_are_seen_from_a_peers_environment(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below, source = tmp_path / "below/site-packages", tmp_path / "source"
    for folder in (below, source):
        folder.mkdir(parents=True)
    (source / "edited_here.py").write_text("")
    (below / "edited.pth").write_text(f"{source}\n")
    monkeypatch.syspath_prepend(str(below))
    write_wheel(wheels, "tiny_peer", "1.5", "")
    python = tiny().prepare(root=tmp_path / "peers")
    assert said_by(python, "import edited_here; print(edited_here.__file__)") == str(
        source / "edited_here.py"
    )


def test_an_environment_is_built_once_and_then_used(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "")
    lines: list[str] = []
    python = tiny().prepare(root=tmp_path / "peers", report=lines.append)
    assert [line.split()[0] for line in lines] == ["making", "installing", "importing", "using"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    again: list[str] = []
    assert tiny().prepare(root=tmp_path / "peers", report=again.append) == python
    assert again == lines[-1:]


def test_another_layer_below_or_another_pin_is_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {tiny().folder_in(tmp_path), tiny("sortedcontainers==2.4.0").folder_in(tmp_path)}
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    folders.add(tiny().folder_in(tmp_path))
    assert len(folders) == 3
    assert all(folder.name.startswith("tiny-1.5-cpython-3") for folder in folders)


def test_a_folder_that_is_not_whole_is_built_anew(tmp_path: Path, wheels: Path) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "")
    folder = tiny().folder_in(tmp_path / "peers")
    (folder / "lib").mkdir(parents=True)
    python = tiny().prepare(root=tmp_path / "peers")
    assert said_by(python, "import tiny_peer; print('there')") == "there"
    python.unlink()
    assert said_by(tiny().prepare(root=tmp_path / "peers"), "print('again')") == "again"
    assert left_in(tmp_path / "peers") == [folder.name]


def test_two_that_want_it_at_once_build_it_once(tmp_path: Path, wheels: Path) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "")
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(tiny().prepare, root=tmp_path / "peers", report=lines.append)
            for _ in range(2)
        ]
        assert len({future.result() for future in futures}) == 1
    assert [line.split()[0] for line in lines].count("making") == 1


def test_a_builder_that_is_killed_leaves_no_half_environment(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "importing"
    slow = f"import os, time; open({str(note)!r}, 'w').close(); time.sleep(float(os.environ['S']))"
    write_wheel(wheels, "tiny_peer", "1.5", slow)
    root = tmp_path / "peers"
    program = (
        "from pathlib import Path; from memos_vllm.bench.peers import PeerEnvironment;"
        "PeerEnvironment(name='tiny', requirements=('tiny_peer==1.5',), imports=('tiny_peer',),"
        f"download_mb=1).prepare(root=Path({str(root)!r}))"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "S": "120"}, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert note.exists()
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    folder = tiny().folder_in(root)
    assert left_in(root) != []
    assert not folder.exists()
    monkeypatch.setenv("S", "0")
    tiny().prepare(root=root)
    assert left_in(root) == [folder.name]


def test_no_wheel_for_this_platform_is_a_reason(tmp_path: Path, wheels: Path) -> None:
    # Not even where it could be compiled: that may take an hour, or fail in many ways.
    (wheels / "tiny_peer-1.5.tar.gz").write_bytes(b"")
    _refused(tmp_path, tiny(), "no wheel of tiny_peer==1.5 for cpython-3")


def test_an_index_that_cannot_be_reached_is_a_reason(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_RETRIES", "1")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        _refused(tmp_path, tiny(), "the package index cannot be reached")


def test_a_peer_that_does_not_import_here_is_left_out_with_the_reason(
    tmp_path: Path, wheels: Path
) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "import no_such_module_anywhere")
    _refused(tmp_path, tiny(), "No module named 'no_such_module_anywhere'")


def test_a_peer_that_crashes_when_imported_is_left_out(tmp_path: Path, wheels: Path) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "import os; os.kill(os.getpid(), 4)")
    _refused(tmp_path, tiny(), "ended by SIGILL")


def test_building_ends_when_its_time_is_over(tmp_path: Path, wheels: Path) -> None:
    write_wheel(wheels, "tiny_peer", "1.5", "import time; time.sleep(120)")
    started = time.monotonic()
    _refused(tmp_path, tiny(), "not done within the time", timeout_seconds=2)
    assert time.monotonic() - started < 30


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "peers").write_text("a file")
    with pytest.raises(PeerUnavailable, match="cannot be used"):
        tiny().prepare(root=tmp_path / "peers")


def test_a_python_without_pip_is_a_reason(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    _refused(tmp_path, tiny(), "ensurepip")


def _refused(
    tmp_path: Path, environment: PeerEnvironment, reason: str, *, timeout_seconds: float = 120
) -> None:
    with pytest.raises(PeerUnavailable) as caught:
        environment.prepare(root=tmp_path / "peers", timeout_seconds=timeout_seconds)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("tiny is left out: ")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "peers") == []


# --- processes --------------------------------------------------------------------------

# Stands in for the Python of a peer: a vLLM server, or LMCache's, as far as they are asked here.
STAND_IN = """#!{python}
import http.server, json, os, pathlib, sys
from multiprocessing import resource_tracker, shared_memory

folder, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
is_store = "lmcache.cli.main" in arguments
if is_store:
    name = arguments[arguments.index("--shm-name") + 1]
    segment = shared_memory.SharedMemory(name=name, create=True, size=4096)
    (folder / "segment").write_text(name)
elif "LMCacheMPConnector" in str(arguments):
    segment = shared_memory.SharedMemory(name=(folder / "segment").read_text())
    # As LMCache's connector does.
    resource_tracker.unregister(segment._name, "shared_memory")
record = dict(arguments=arguments, environment=dict(os.environ), pid=os.getpid())
with (folder / "started").open("a") as file:
    file.write(json.dumps(record) + "\\n")
if not is_store and (folder / "no-engine").exists():
    raise SystemExit(3)
refusals = 2

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = ["/healthcheck", "/metrics"] if is_store else ["/health", "/metrics"]
        page = folder / ("store-metrics" if is_store else "engine-metrics")
        self.answer(200 if self.path in known else 404, page.read_bytes() if page.exists() else b"")

    def do_POST(self):
        global refusals
        refusals -= 1
        with (folder / "asked").open("a") as file:
            file.write(self.path + "\\n")
        closed = os.environ.get("VLLM_SERVER_DEV_MODE") != "1"
        self.answer(404 if closed else 200, json.dumps(dict(success=refusals < 0)).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", int(arguments[-1])), Answers).serve_forever()
"""

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
OPTIONS = ("--served-model-name", "bench", "--enforce-eager", "--num-gpu-blocks-override", "120")
METRICS = """# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="bench",source="local_compute"} 45.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="bench",source="local_cache_hit"} 128.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="bench",source="external_kv_transfer"} 3e3
vllm:prompt_tokens_by_source_created{engine="0",model_name="bench",source="local_compute"} 1.7e9
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = tmp_path / "stand-in"
    folder.mkdir()
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    return python


def server_of(
    peer: Peer, stand_in: Path, tmp_path: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> PeerServer:
    return peer.server(
        "some-model",
        python=stand_in,
        options=OPTIONS,
        environment=environment,
        folder=tmp_path,
    )


def started_by(stand_in: Path) -> list[dict[str, object]]:
    lines = (stand_in.parent / "started").read_text().splitlines()
    return [json.loads(line) for line in lines]


def option(arguments: object, name: str) -> str:
    assert isinstance(arguments, list)
    return str(arguments[arguments.index(name) + 1])


def test_lmcache_starts_a_store_and_then_plain_vllm_with_its_connector(
    tmp_path: Path, stand_in: Path
) -> None:
    with server_of(LMCache(store_gib=3), stand_in, tmp_path):
        pass
    store, engine = started_by(stand_in)
    assert store["arguments"][:3] == ["-m", "lmcache.cli.main", "server"]  # type: ignore[index]
    assert option(store["arguments"], "--l1-size-gb") == "3"
    # Nothing of it is reached from elsewhere.
    assert {option(store["arguments"], name) for name in ("--host", "--http-host")} == {"127.0.0.1"}
    connector = json.loads(option(engine["arguments"], "--kv-transfer-config"))
    assert connector["kv_connector"] == "LMCacheMPConnector"
    assert connector["kv_connector_extra_config"] == {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": int(option(store["arguments"], "--port")),
    }
    for process in (store, engine):
        assert process["environment"]["DO_NOT_TRACK"] == "1"  # type: ignore[index]


def test_two_lmcaches_share_neither_memory_nor_ports(tmp_path: Path, stand_in: Path) -> None:
    with (
        server_of(LMCache(), stand_in, tmp_path) as one,
        server_of(LMCache(), stand_in, tmp_path) as other,
    ):
        assert one.url != other.url
    stores = started_by(stand_in)[::2]
    for name in ("--shm-name", "--port", "--http-port"):
        assert len({option(store["arguments"], name) for store in stores}) == 2


def test_the_example_connector_keeps_its_files_in_the_folder_given(
    tmp_path: Path, stand_in: Path
) -> None:
    with server_of(ExampleConnector(), stand_in, tmp_path):
        pass
    (engine,) = started_by(stand_in)
    connector = json.loads(option(engine["arguments"], "--kv-transfer-config"))
    assert connector["kv_connector"] == "ExampleConnector"
    files = Path(connector["kv_connector_extra_config"]["shared_storage_path"])
    assert files.is_relative_to(tmp_path)
    assert files.is_dir()
    # In two steps it would save half a prompt under the name of the whole.
    assert "--no-enable-chunked-prefill" in engine["arguments"]  # type: ignore[operator]
    assert not ExampleConnector.salted


@pytest.mark.parametrize("peer", [LMCache(), ExampleConnector()], ids=lambda peer: peer.name)
def test_a_peer_gets_the_options_and_the_environment_of_the_others(
    peer: Peer, tmp_path: Path, stand_in: Path
) -> None:
    with server_of(peer, stand_in, tmp_path):
        pass
    engine = started_by(stand_in)[-1]
    arguments, environment = engine["arguments"], engine["environment"]
    assert isinstance(arguments, list)
    assert isinstance(environment, dict)
    assert arguments[1] == "vllm.entrypoints.openai.api_server"
    assert option(arguments, "--model") == "some-model"
    assert option(arguments, "--host") == "127.0.0.1"
    start = arguments.index(OPTIONS[0])
    assert tuple(arguments[start : start + len(OPTIONS)]) == OPTIONS
    assert ENVIRONMENT.items() <= environment.items()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_nothing_of_a_peer_is_left_when_it_has_ended(
    end: str, tmp_path: Path, stand_in: Path
) -> None:
    server = server_of(LMCache(), stand_in, tmp_path).start(timeout_seconds=30)
    pids = [int(str(each["pid"])) for each in started_by(stand_in)]
    assert set(pids) <= set(server.pids())
    segment = Path("/dev/shm", (stand_in.parent / "segment").read_text())
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [True, True]
    assert segment.exists()
    getattr(server, end)()
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False]
    assert not segment.exists()


def test_a_vllm_that_ends_takes_no_memory_from_the_store_that_lives_on(
    tmp_path: Path, stand_in: Path
) -> None:
    with server_of(LMCache(), stand_in, tmp_path) as server:
        segment = Path("/dev/shm", (stand_in.parent / "segment").read_text())
        assert segment in server.engine.shared_memory()
        server.engine.kill()
        assert segment.exists()
        server.engine.start(timeout_seconds=30)
        assert segment in server.engine.shared_memory()
        server.engine.stop()
        assert segment.exists()
    assert not segment.exists()


def test_a_vllm_that_does_not_start_takes_its_store_with_it(tmp_path: Path, stand_in: Path) -> None:
    (stand_in.parent / "no-engine").touch()
    with pytest.raises(ServerFailed, match="exit code 3"):
        server_of(LMCache(), stand_in, tmp_path).start(timeout_seconds=30)
    store = started_by(stand_in)[0]
    assert not Path(f"/proc/{store['pid']}").exists()
    assert not Path("/dev/shm", (stand_in.parent / "segment").read_text()).exists()


def test_a_paused_peer_stands_still_with_its_store(tmp_path: Path, stand_in: Path) -> None:
    def states() -> list[str]:
        pids = [each["pid"] for each in started_by(stand_in)]
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
        return [stat.rpartition(")")[2].split()[0] for stat in stats]

    with server_of(LMCache(), stand_in, tmp_path) as server:
        with server.paused():
            assert states() == ["T", "T"]
        assert "T" not in states()


def test_forgetting_waits_until_vllm_has_saved_what_it_holds(
    tmp_path: Path, stand_in: Path
) -> None:
    with server_of(ExampleConnector(), stand_in, tmp_path) as server:
        server.forget_prefixes()
    # Refused twice. Never with `reset_external`, which would empty the peer's store as well.
    asked = (stand_in.parent / "asked").read_text().splitlines()
    assert asked == ["/reset_prefix_cache"] * 3


def test_a_vllm_that_cannot_forget_says_what_it_needs(tmp_path: Path, stand_in: Path) -> None:
    with (
        server_of(ExampleConnector(), stand_in, tmp_path, {}) as server,
        pytest.raises(ServerFailed, match="VLLM_SERVER_DEV_MODE=1"),
    ):
        server.forget_prefixes()


# --- counting ---------------------------------------------------------------------------


def test_vllm_and_the_peer_both_tell_what_came_from_the_store(
    tmp_path: Path, stand_in: Path
) -> None:
    (stand_in.parent / "engine-metrics").write_text(METRICS)
    (stand_in.parent / "store-metrics").write_text(
        'lmcache_mp_lookup_hit_tokens_total{model_name="m"} 2944.0\n'
        "lmcache_mp_lookup_hit_tokens_created 1.7e9\n"
    )
    with server_of(LMCache(), stand_in, tmp_path) as server:
        assert server.prompt_tokens() == PromptTokens(computed=45, own_cache=128, store=3000)
        assert server.store_tokens() == 2944
    with server_of(ExampleConnector(), stand_in, tmp_path) as server:
        with server.engine.log_path.open("a") as log:
            log.write("INFO: Inject KV cache of 3072 tokens to the paged memory\n" * 2)
        assert server.store_tokens() == 6144


def test_only_tokens_from_the_store_make_a_hit() -> None:
    before = PromptTokens(computed=3000, own_cache=256, store=1000)
    hit = PromptTokens(computed=3040, own_cache=256, store=3944).since(before)
    assert hit == PromptTokens(computed=40, own_cache=0, store=2944)
    assert hit.hit_fault(at_least=2944) is None
    assert "expected at least 3072" in (hit.hit_fault(at_least=3072) or "")
    helped = PromptTokens(computed=40, own_cache=128, store=2944)
    assert "own prefix cache gave 128" in (helped.hit_fault(at_least=2944) or "")


def test_a_vllm_that_counts_otherwise_is_refused() -> None:
    with pytest.raises(MemosError, match="external_kv_transfer"):
        parse_prompt_tokens("\n".join(METRICS.splitlines()[:3]))


def test_without_vllm_every_peer_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    servers, skipped = ready(tmp_path)
    assert servers == {}
    assert sorted(skipped) == ["example-connector", "lmcache"]
    assert all("vLLM is not installed" in reason for reason in skipped.values())


def test_a_peer_that_cannot_be_built_does_not_keep_the_other_out(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    servers, skipped = ready(tmp_path)
    assert list(servers) == ["example-connector"]
    assert "no wheel of lmcache" in skipped["lmcache"]


def ready(tmp_path: Path) -> tuple[dict[str, PeerServer], dict[str, str]]:
    return ready_peers(
        all_peers(), model="some-model", options=OPTIONS, environment=ENVIRONMENT, folder=tmp_path
    )
