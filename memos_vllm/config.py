"""Settings of the server and of the client; the only module that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import unquote, urlsplit

import platformdirs
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1 << 30
# Names the run of a server to all its processes.
RUN_VARIABLE = "MEMOS_RUN"
DEFAULT_EMBEDDER = "minilm-l6-v2-int8"
ArtifactDtype: TypeAlias = Literal["exact", "int8", "int4", "fp8"]


def default_data_dir() -> Path:
    """The platform's folder for this user's application data."""
    return Path(platformdirs.user_data_dir("memos-vllm", appauthor=False))


def default_models_dir() -> Path:
    """Where `memos-vllm models prepare` puts models."""
    return _cache_dir() / "models"


def default_peers_dir() -> Path:
    """Where the benchmarks put the environments of what they compare with."""
    return _cache_dir() / "peers"


def _cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir("memos-vllm", appauthor=False))


class ServerSettings(BaseSettings):
    """What a memos_vllm server needs beyond vLLM's own options.

    Every field can be given as `MEMOS_<NAME>` in the environment, as an option of
    `memos-vllm serve`, or in `kv_connector_extra_config`; the later wins over the earlier.
    """

    model_config = SettingsConfigDict(env_prefix="MEMOS_", extra="ignore")

    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="catalog, artifacts and keys of this server",
    )
    ray_address: str | None = Field(
        default=None, description="a Ray cluster to join; one of its own on this machine if absent"
    )
    ray_resource: str | None = Field(
        default=None,
        description="only nodes of that cluster that offer this Ray resource host the actors; any "
        "node when absent",
    )
    # It may hold a password: child processes find it in the environment, not in vLLM's config.
    catalog_url: str | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="SQLAlchemy URL; SQLite in the data folder when absent",
    )
    artifact_url: str | None = Field(
        default=None,
        description="file:// URL or path of the artifact folder, which servers of one catalog may "
        "share; one in the data folder when absent",
    )
    artifact_budget_gib: float = Field(
        default=20.0, gt=0, description="most the artifact store may hold, in GiB"
    )
    residency_fraction: float = Field(
        default=0.25, ge=0, le=1, description="share of the KV pool that memory may keep resident"
    )
    artifact_dtype: ArtifactDtype = Field(
        default="exact",
        description="how KV is written to disk: exact, or smaller and approximate (int8 halves "
        "bfloat16, int4 takes less than a third)",
    )
    allow_portable: bool = Field(
        default=False, description="load artifacts baked under another numerics class"
    )
    max_import_gib: float = Field(
        default=64.0, gt=0, description="largest .memcube archive that is taken in, in GiB"
    )
    ticket_ttl_seconds: float = Field(default=300.0, gt=0)
    qdrant_url: str | None = Field(
        default=None,
        description="URL of a Qdrant server; an index in the data folder when absent",
    )
    qdrant_namespace: str | None = Field(
        default=None,
        description="starts the names of collections on a Qdrant server; one of the catalog's own "
        "when absent, since catalogs that share a server need different ones",
    )
    qdrant_shards: int = Field(
        default=1, ge=1, description="shards of a new collection on a Qdrant server"
    )
    qdrant_replicas: int = Field(
        default=1, ge=1, description="replicas of a new collection on a Qdrant server"
    )
    qdrant_quantization: bool = Field(
        default=False, description="keep int8 copies of vectors in memory on a Qdrant server"
    )
    embedder: str = Field(
        default=DEFAULT_EMBEDDER,
        description="what vectors are made with: a packaged model, sentence-transformers:MODEL, "
        "fastembed:NAME, openai:MODEL@URL, or none for search by words only",
    )
    embedder_threads: int = Field(default=1, ge=1, description="threads of a local embedder")
    reranker: str | None = Field(
        default=None,
        description="what puts the best hits into another order: sentence-transformers:MODEL or "
        "openai:MODEL@URL",
    )
    # Read from the environment only: what is passed on to the engine holds no secret.
    qdrant_api_key: SecretStr | None = Field(default=None, exclude=True)
    embedder_api_key: SecretStr | None = Field(default=None, exclude=True)
    reranker_api_key: SecretStr | None = Field(default=None, exclude=True)

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("artifact_url")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parsed = urlsplit(value)
        if parsed.scheme not in {"", "file"}:
            raise ValueError(
                f"KV is read through the page cache, so it takes a folder, not {parsed.scheme}://; "
                "mount it, and give file:///its/path"
            )
        if parsed.netloc not in {"", "localhost"}:
            raise ValueError(f"file://{parsed.netloc}/ names another host; give file:///a/path")
        path = unquote(parsed.path) if parsed.scheme else value
        return str(Path(path).expanduser().absolute())

    @property
    def resolved_catalog_url(self) -> str:
        return self.catalog_url or f"sqlite:///{self.data_dir / 'catalog.sqlite'}"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def artifacts_dir(self) -> Path:
        return Path(self.artifact_url) if self.artifact_url else self.data_dir / "artifacts"

    @property
    def index_dir(self) -> Path:
        return self.data_dir / "qdrant"

    @property
    def spool_dir(self) -> Path:
        """Where archives lie while they are sent and received; files without a name."""
        return self.data_dir / "run" / "spool"

    @property
    def secrets_dir(self) -> Path:
        return self.data_dir / "secrets"

    @property
    def artifact_budget_bytes(self) -> int:
        return int(self.artifact_budget_gib * GIB)

    @property
    def max_import_bytes(self) -> int:
        return int(self.max_import_gib * GIB)


class ClientSettings(BaseSettings):
    """Where the command line and the Python client find their server."""

    model_config = SettingsConfigDict(env_prefix="MEMOS_", extra="ignore")

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None


def set_run_environment(run: str) -> None:
    """Mark every process that is started from now on as one of this run."""
    os.environ[RUN_VARIABLE] = run


def run_in_environment() -> str | None:
    """The run that this process belongs to; None when no supervisor started it."""
    return os.environ.get(RUN_VARIABLE)


def set_ray_environment(token_path: Path) -> None:
    """Have Ray stay on the loopback address, ask for our token and report to nobody."""
    os.environ.update(
        # What it is called for: systems whose firewalls ask about every port that is opened.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token_path),
        RAY_USAGE_STATS_ENABLED="0",
        # By default Ray gives its workers way to everything else (15), and a chat waits for them.
        RAY_worker_niceness="0",
        # Nobody looks at the history of calls, which costs each of them a quarter of its time.
        RAY_task_events_report_interval_ms="0",
        # It is vLLM that fills the memory: killing the actors, as Ray would, frees next to none.
        RAY_memory_monitor_refresh_ms="0",
    )


class VllmSwitches(BaseSettings):
    """Settings of vLLM's that decide who gets in, or what is told about them."""

    model_config = SettingsConfigDict(env_prefix="VLLM_", extra="ignore")

    api_key: SecretStr | None = None
    use_rust_frontend: str = "0"
    debug_log_api_server_response: str = "false"

    @property
    def rust_frontend(self) -> bool:
        return self.use_rust_frontend.strip() not in {"", "0"}

    @property
    def log_responses(self) -> bool:
        return self.debug_log_api_server_response.strip().lower() == "true"


def vllm_plugins_in_environment() -> list[str] | None:
    """The user's `VLLM_PLUGINS`, or None when unset (which means: all of them)."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else [name for name in value.split(",") if name]


def set_vllm_environment(**values: str) -> None:
    """Set variables that vLLM and its child processes read, keeping what the user had set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def set_catalog_url(url: str) -> None:
    """Have child processes find the catalog here."""
    os.environ["MEMOS_CATALOG_URL"] = url


def set_vllm_plugins(names: list[str]) -> None:
    """Name the plugins that vLLM's processes load; children inherit it."""
    os.environ["VLLM_PLUGINS"] = ",".join(names)
