"""vLLM's own serve command, with memory set up; a child of `engine.supervisor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from memos_vllm.activation.store.claim import claim_folder
from memos_vllm.config import (
    ArtifactDtype,
    ServerSettings,
    set_catalog_url,
    set_vllm_plugins,
    vllm_plugins_in_environment,
)
from memos_vllm.control.keys import keys_exist
from memos_vllm.engine.doors import guard_outermost, refuse_open_doors
from memos_vllm.engine.names import CONNECTOR_NAME, PLUGIN_NAME
from memos_vllm.engine.secrets import load_keys
from memos_vllm.errors import ConfigurationError, MemosError
from memos_vllm.parent_death import end_with_parent

_RESERVED_CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"
# Groups that VLLM_PLUGINS filters besides ours; naming one plugin would switch the others off.
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def main(argv: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        argv: the model, our options and any of `vllm serve`, as on the command line.
    Returns:
        The process's exit code: 0 stopped, 1 failed, 2 misused.
    """
    end_with_parent(signal.SIGTERM)
    own, vllm_argv = own_parser().parse_known_args(list(argv))
    try:
        settings = _settings(own)
        if settings.catalog_url is not None:
            set_catalog_url(settings.catalog_url)
        _use_plugins()
        command, args = _parse(_with_model_folder(vllm_argv))
        configure(args, settings, explicit_policy=_names_failure_policy(vllm_argv))
        refuse_open_doors(
            args,
            data_dir=settings.data_dir,
            has_keys=lambda: keys_exist(settings.resolved_catalog_url),
        )
        if settings.artifact_url is not None:
            claim_folder(settings.artifacts_dir, mac_key=load_keys(settings.secrets_dir).artifact)
        compute_on_as_many_cores_as_plain_vllm(args)
    except MemosError as error:
        print(f"memos-vllm serve: {error}", file=sys.stderr)
        return 2
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


def own_settings(argv: Sequence[str]) -> ServerSettings:
    """Our own settings among the options of a command line.

    Raises:
        ConfigurationError: a value is of the wrong type or out of range.
    """
    own, _ = own_parser().parse_known_args(list(argv))
    return _settings(own)


def own_parser() -> argparse.ArgumentParser:
    """Our own options; everything else belongs to `vllm serve`."""
    parser = argparse.ArgumentParser(
        prog="memos-vllm serve", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    group = parser.add_argument_group("memory")
    group.add_argument("--data-dir", type=Path, help="catalog, artifacts and keys of this server")
    group.add_argument(
        "--ray-address",
        help="a Ray cluster to join (HOST:PORT); one of its own on this machine if absent",
    )
    group.add_argument(
        "--ray-resource",
        help="only nodes of that cluster that offer this Ray resource host the actors (any node)",
    )
    group.add_argument(
        "--catalog-url",
        help="postgresql://USER@HOST/NAME, or SQLite in the data folder if absent; a password is "
        "better given in MEMOS_CATALOG_URL (or PGPASSWORD, without --ray-address), which `ps` "
        "does not show",
    )
    group.add_argument(
        "--artifact-url",
        help="file:// URL or path of the artifact folder, on a file system that servers of one "
        "catalog may share; one in the data folder if absent",
    )
    group.add_argument(
        "--artifact-budget-gib", type=float, help="most the artifact store may hold (20)"
    )
    group.add_argument(
        "--residency-fraction",
        type=float,
        help="share of the KV pool that memory may keep resident (0.25)",
    )
    group.add_argument(
        "--artifact-dtype",
        choices=get_args(ArtifactDtype),
        help="how KV is written to disk (exact); the others are smaller and approximate",
    )
    group.add_argument(
        "--max-import-gib", type=float, help="largest archive of a cube that is taken in (64)"
    )
    group.add_argument(
        "--allow-portable",
        action="store_true",
        default=None,
        help="load artifacts that were baked under another numerics class",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--qdrant-url", help="URL of a Qdrant server; an index in the data folder if absent"
    )
    search.add_argument(
        "--qdrant-namespace",
        help="starts our collections' names there (memos- and 16 digits of the catalog's own)",
    )
    search.add_argument("--qdrant-shards", type=int, help="shards of a new collection there (1)")
    search.add_argument(
        "--qdrant-replicas", type=int, help="replicas of a new collection there (1)"
    )
    search.add_argument(
        "--qdrant-quantization",
        action="store_true",
        default=None,
        help="keep int8 copies of vectors in memory there, for large collections",
    )
    search.add_argument(
        "--embedder",
        help="what vectors are made with: minilm-l6-v2-int8 (the default), "
        "sentence-transformers:MODEL, fastembed:NAME, openai:MODEL@URL, or none",
    )
    search.add_argument("--embedder-threads", type=int, help="threads of a local embedder (1)")
    search.add_argument(
        "--reranker",
        help="what puts the best hits into another order: sentence-transformers:MODEL or "
        "openai:MODEL@URL (none)",
    )
    return parser


def configure(args: Namespace, settings: ServerSettings, *, explicit_policy: bool) -> None:
    """Set connector, middleware and address in vLLM's arguments, keeping what the user set.

    Args:
        args: of `vllm serve`; mutated.
        explicit_policy: the user chose a kv_load_failure_policy.
    """
    args.kv_transfer_config = _transfer_config(
        args.kv_transfer_config, settings, explicit_policy=explicit_policy
    )
    guard_outermost(args)
    if args.host is None and getattr(args, "uds", None) is None:
        # vLLM would listen on every address.
        args.host = "127.0.0.1"
    if getattr(args, "kv_offloading_size", None) is not None:
        raise ConfigurationError(
            "--kv-offloading-size would put a connector of vLLM's in the place of memory's; "
            "leave it out, or name both in --kv-transfer-config as children of a MultiConnector"
        )


def compute_on_as_many_cores_as_plain_vllm(args: Namespace) -> None:
    """On a CPU, vLLM takes one more core per worker from the model when there is a KV connector,
    for those that poll. Memory's copies are short and need none, so the model gets it back.

    What the user set is kept, and so is what vLLM does with too few cores: use them all.
    """
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    if not current_platform.is_cpu() or _RESERVED_CORES in os.environ:
        return
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    cores = {cpu.physical_core for cpu in get_allowed_cpu_list()}
    if len(cores) > 2 * workers:
        os.environ[_RESERVED_CORES] = str(workers)


def _transfer_config(given: Any, settings: ServerSettings, *, explicit_policy: bool) -> Any:
    from vllm.config import KVTransferConfig

    own = {
        "kv_connector": CONNECTOR_NAME,
        "kv_role": "kv_both",
        "kv_connector_extra_config": _extra_config(settings),
    }
    if given is None or given.kv_connector is None:
        return KVTransferConfig(**own, kv_load_failure_policy="recompute")
    if given.has_connector(CONNECTOR_NAME):
        if not explicit_policy:
            given.kv_load_failure_policy = "recompute"
        if given.kv_connector == CONNECTOR_NAME:
            given.kv_connector_extra_config = {
                **_extra_config(settings),
                **given.kv_connector_extra_config,
            }
        return given
    raise ConfigurationError(
        f"the KV connector {given.kv_connector} would take the place of memory's; leave "
        "--kv-transfer-config out, or name both as children of a MultiConnector, "
        f"{CONNECTOR_NAME} first. Another connector stores KV without regard to cubes, and gets "
        "no kv_transfer_params from clients."
    )


def _extra_config(settings: ServerSettings) -> dict[str, Any]:
    """The settings as the engine's processes read them; no secret is among them."""
    return json.loads(settings.model_dump_json(exclude_none=True))  # type: ignore[no-any-return]


def _settings(own: Namespace) -> ServerSettings:
    given = {name: value for name, value in vars(own).items() if value is not None}
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        # Pydantic's words before those of a check of ours.
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{option}: {said}") from error


def _use_plugins() -> None:
    """Name our plugins in VLLM_PLUGINS without switching others off."""
    named = vllm_plugins_in_environment()
    if named is None:
        named = [
            plugin.name
            for group in _PLUGIN_GROUPS
            for plugin in importlib.metadata.entry_points(group=group)
        ]
    set_vllm_plugins(list(dict.fromkeys([*named, PLUGIN_NAME])))


def _parse(argv: list[str]) -> tuple[Any, Namespace]:
    """Parse with vLLM's own serve parser."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="memos-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    return command, parser.parse_args(["serve", *argv])


def _with_model_folder(argv: list[str]) -> list[str]:
    """Replace a short model name, such as smollm2-135m-instruct, by its prepared folder."""
    from memos_vllm.models.prepare import KNOWN_MODELS, prepare

    if argv and argv[0] in KNOWN_MODELS and not Path(argv[0]).exists():
        folder = prepare(argv[0], progress=lambda line: print(line, file=sys.stderr))
        return [str(folder), *argv[1:], *_served_name(argv)]
    return argv


def _served_name(argv: list[str]) -> list[str]:
    """Serve a short model name under that name, unless the user chose another."""
    if any(arg.replace("_", "-").startswith("--served-model-name") for arg in argv):
        return []
    return ["--served-model-name", argv[0]]


def _names_failure_policy(argv: Sequence[str]) -> bool:
    return any("kv_load_failure_policy" in arg or "kv-load-failure-policy" in arg for arg in argv)
