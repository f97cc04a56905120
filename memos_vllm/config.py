"""Settings of the server and of the client; the only module that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias

import platformdirs
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1 << 30
DEFAULT_EMBEDDER = "minilm-l6-v2-int8"
ArtifactDtype: TypeAlias = Literal["exact", "int8", "int4", "fp8"]


def default_data_dir() -> Path:
    """The platform's folder for this user's application data."""
    return Path(platformdirs.user_data_dir("memos-vllm", appauthor=False))


def default_models_dir() -> Path:
    """Where `memos-vllm models prepare` puts models."""
    return Path(platformdirs.user_cache_dir("memos-vllm", appauthor=False)) / "models"


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
    catalog_url: str | None = Field(
        default=None, description="SQLAlchemy URL; SQLite in the data folder when absent"
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

    @property
    def resolved_catalog_url(self) -> str:
        return self.catalog_url or f"sqlite:///{self.data_dir / 'catalog.sqlite'}"

    @property
    def artifacts_dir(self) -> Path:
        return self.data_dir / "artifacts"

    @property
    def index_dir(self) -> Path:
        return self.data_dir / "qdrant"

    @property
    def secrets_dir(self) -> Path:
        return self.data_dir / "secrets"

    @property
    def artifact_budget_bytes(self) -> int:
        return int(self.artifact_budget_gib * GIB)


class ClientSettings(BaseSettings):
    """Where the command line and the Python client find their server."""

    model_config = SettingsConfigDict(env_prefix="MEMOS_", extra="ignore")

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None


def vllm_plugins_in_environment() -> list[str] | None:
    """The user's `VLLM_PLUGINS`, or None when unset (which means: all of them)."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else [name for name in value.split(",") if name]


def set_vllm_environment(**values: str) -> None:
    """Set variables that vLLM and its child processes read, keeping what the user had set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def set_vllm_plugins(names: list[str]) -> None:
    """Name the plugins that vLLM's processes load; children inherit it."""
    os.environ["VLLM_PLUGINS"] = ",".join(names)
