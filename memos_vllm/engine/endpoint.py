"""The endpoint plugin: memory on vLLM's own HTTP server."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.api_router import (
    create_chat_completion as create_plain_chat_completion,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from memos_vllm.activation.prefix import RENDERER_VERSION, Placement
from memos_vllm.activation.store import PrefixIdentity
from memos_vllm.activation.templates import TemplateTraits, probe_template
from memos_vllm.api import examples
from memos_vllm.api.authentication import STATE, Authenticator, principal_in
from memos_vllm.api.error_table import error_response
from memos_vllm.api.log_redaction import redact_server_logs
from memos_vllm.api.middleware import guard_listeners
from memos_vllm.api.routes import build_router
from memos_vllm.config import ServerSettings, run_in_environment
from memos_vllm.control.mos import Mos
from memos_vllm.control.snapshots import SWEEP_SECONDS, Snapshots
from memos_vllm.domain.access import Principal
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.job import JobKind
from memos_vllm.engine import assembly
from memos_vllm.engine.baker import Baker
from memos_vllm.engine.cartridges import ArtifactPorter
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.engine.composing import Composer
from memos_vllm.engine.doors import guard_outermost, refuse_open_doors
from memos_vllm.engine.eraser import Eraser
from memos_vllm.engine.gateway import VllmGateway
from memos_vllm.engine.job_runner import JobRunner
from memos_vllm.engine.log_search import LogSearch
from memos_vllm.engine.model_list import list_models
from memos_vllm.engine.names import CONNECTOR_NAME, PLUGIN_NAME
from memos_vllm.engine.options import parse_cube_ids, parse_options
from memos_vllm.engine.pool_watch import PoolWatch
from memos_vllm.engine.protocol import ChatErrorReply, MemoryChatRequest
from memos_vllm.engine.reader import Reader
from memos_vllm.engine.recall import Recall
from memos_vllm.engine.reindexer import Reindexer
from memos_vllm.engine.remembering import TurnWriter
from memos_vllm.engine.run_folder import log_folders, wait_for_address
from memos_vllm.engine.secrets import ServerKeys, artifact_scope, load_keys
from memos_vllm.engine.stats import count_guard_event
from memos_vllm.engine.template import TokenizerTemplate, special_tokens_of
from memos_vllm.engine.ticket import TicketSigner
from memos_vllm.engine.usage import UsageRecorder
from memos_vllm.errors import ConfigurationError, MemosError, TemplateError, Unavailable
from memos_vllm.plaintext.store import PlaintextStore

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.tasks import SupportedTask

    from memos_vllm.control.actors import ControlPlane

logger = logging.getLogger(__name__)

_CONTROL_PLANE_SECONDS = 120.0
_COMMON_KINDS = tuple(kind for kind in JobKind if kind is not JobKind.ERASE)


@dataclass(slots=True)
class _Running:
    """What the routes use once the server has started."""

    mos: Mos
    is_down: Callable[[], bool]
    chat: MemoryChat
    gateway: VllmGateway
    plaintext: PlaintextStore
    keys: ServerKeys
    tasks: list[asyncio.Task[None]]


class MemosEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = PLUGIN_NAME
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._running: _Running | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes and the guard; replace POST /v1/chat/completions by one that knows
        cubes, and GET /v1/models by one that knows who asks."""
        guard_outermost(app.state.args)
        redact_server_logs()
        authenticator = Authenticator(
            lambda: self._started().mos, is_down=lambda: self._started().is_down()
        )
        setattr(app.state, STATE, authenticator)
        app.include_router(
            build_router(
                mos=lambda: self._started().mos,
                plaintext=lambda: self._started().plaintext,
                gateway=lambda: self._started().gateway,
                principal=_principal,
                tombstone_key=lambda: self._started().keys.tombstone,
            )
        )
        app.add_api_route("/v1/models", list_models, methods=["GET"])
        app.add_api_route(
            "/v1/chat/completions",
            self._chat_route(),
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            summary="Chat, with the memory of cubes when memcube_id names any",
            tags=["chat"],
            responses={
                200: {"content": {"text/event-stream": {}}},
                **examples.refusals(ChatErrorReply),
            },
        )

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Open the catalog and the store, and start the background work."""
        serving: OpenAIServingChat | None = getattr(state, "openai_serving_chat", None)
        if engine_client is None or serving is None:
            return
        vllm_config = engine_client.vllm_config
        if not _connector_is_ours(vllm_config):
            raise ConfigurationError(
                "the memos plugin needs its connector, which `memos-vllm serve` sets: start the "
                "server with it instead of `vllm serve`"
            )
        if getattr(args, "disable_log_stats", False):
            logger.warning(
                "memos: without engine statistics (--disable-log-stats) the resident tokens show "
                "as 0, and a bake whose save failed ends only when its time is up"
            )
        settings = assembly.settings_of(vllm_config)
        keys = load_keys(settings.secrets_dir)
        control = await asyncio.to_thread(_join_control_plane, settings)
        mos, plaintext = control.mos, control.plaintext
        snapshots = Snapshots(mos, is_down=control.mos_is_down)
        await asyncio.to_thread(
            refuse_open_doors, args, data_dir=settings.data_dir, has_keys=mos.has_keys
        )
        signer = TicketSigner(keys.ticket, ttl_seconds=settings.ticket_ttl_seconds)
        usage = UsageRecorder(mos)
        fingerprint = await asyncio.to_thread(assembly.fingerprint_of, vllm_config)
        numerics = assembly.numerics_of(vllm_config)
        store = assembly.open_store(vllm_config, budget=False)

        def record_later(snapshot: CubeSnapshot, head: list[int], kept_tokens: int) -> None:
            baker.record_later(snapshot, head, kept_tokens)

        def wake() -> None:
            jobs.wake()
            erasures.wake()

        special_tokens = special_tokens_of(serving.renderer.tokenizer)
        composer = Composer(serving, _traits(serving), special_tokens)
        chat = MemoryChat(
            mos=mos,
            snapshots=snapshots,
            serving=serving,
            keys=keys,
            signer=signer,
            composer=composer,
            recall=Recall(plaintext, count_tokens=composer.count_note_tokens),
            writer=TurnWriter(mos, on_written=wake),
            on_usage=usage.note,
            on_served=record_later,
        )

        def identity(scope: str) -> PrefixIdentity:
            return PrefixIdentity(scope, fingerprint.digest, numerics, RENDERER_VERSION)

        baker = Baker(mos=mos, chat=chat, store=store, identity=identity)
        reader = Reader(
            mos=mos, plaintext=plaintext, serving=serving, special_tokens=special_tokens
        )
        jobs = JobRunner(
            control.scheduler,
            {
                JobKind.BAKE: baker.bake,
                JobKind.REBUILD: baker.bake,
                JobKind.EXTRACT: reader.extract,
                JobKind.REINDEX: Reindexer(mos, plaintext).reindex,
            },
            kinds=_COMMON_KINDS,
        )
        eraser = Eraser(
            mos=mos,
            plaintext=plaintext,
            store=store,
            residency=PoolWatch(
                engine_client, reports=not getattr(args, "disable_log_stats", False)
            ),
            logs=LogSearch(lambda: log_folders(settings.run_dir)),
            scope=lambda cube_id, epoch: artifact_scope(keys.salt, [(cube_id, epoch)]),
            key=keys.tombstone,
        )
        # An erasure may wait for an index or a disk, and no bake has to wait for that.
        erasures = JobRunner(
            control.scheduler, {JobKind.ERASE: eraser.erase}, kinds=(JobKind.ERASE,)
        )
        gateway = VllmGateway(
            engine=engine_client,
            control=control,
            snapshots=snapshots,
            chat=chat,
            wake_jobs=wake,
            store=store,
            fingerprint=fingerprint,
            numerics=numerics,
            settings=settings,
            cartridges=ArtifactPorter(
                mos=mos,
                chat=chat,
                baker=baker,
                store=store,
                identity=identity,
                settings=settings,
                wake_jobs=wake,
            ),
        )
        await asyncio.to_thread(mos.sweep_imports)
        if count_guard_event not in guard_listeners:
            guard_listeners.append(count_guard_event)
        tasks = [
            asyncio.create_task(work)
            for work in (
                _forget_then_run(baker, jobs),
                erasures.run(),
                usage.run(),
                _sweep(snapshots),
                _quietly(chat.warm_up()),
            )
        ]
        self._running = _Running(mos, control.mos_is_down, chat, gateway, plaintext, keys, tasks)
        logger.info("memos: ready; data in %s", settings.data_dir)

    def _started(self) -> _Running:
        if self._running is None:
            raise Unavailable("memory is still starting", retry_after_seconds=2)
        return self._running

    def _chat_route(self) -> Any:
        @with_cancellation
        @load_aware_call
        async def create_chat_completion(
            request: MemoryChatRequest, raw_request: Request
        ) -> Response:
            """Everything that vLLM's route takes, plus `memcube_id` and `memos`."""
            if not request.names_memory:
                plain: Response = await create_plain_chat_completion(request, raw_request)
                return plain
            try:
                return await self._memory_chat(request, raw_request)
            except MemosError as error:
                return error_response(error)

        return create_chat_completion

    async def _memory_chat(self, request: MemoryChatRequest, raw_request: Request) -> Response:
        cube_ids = parse_cube_ids(request.memcube_id, request.mem_cube_id)
        answer = await self._started().chat.complete(
            request,
            raw_request,
            principal=_principal(raw_request),
            cube_ids=cube_ids,
            options=parse_options(request.memos),
        )
        if isinstance(answer, ErrorResponse):
            return JSONResponse(answer.model_dump(), status_code=answer.error.code)
        if isinstance(answer, Mapping):
            return JSONResponse(answer)
        args = getattr(raw_request.app.state, "args", None)
        keep_alive = float(getattr(args, "sse_keep_alive_interval", 0))
        return StreamingResponse(
            with_sse_keep_alive(answer, keep_alive), media_type="text/event-stream"
        )


async def _forget_then_run(baker: Baker, jobs: JobRunner) -> None:
    await asyncio.to_thread(baker.forget_unusable)
    await jobs.run()


async def _sweep(snapshots: Snapshots) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        snapshots.sweep()


async def _quietly(work: Awaitable[None]) -> None:
    """For work that nobody waits for, and that is done again when it is needed."""
    try:
        await work
    except MemosError as error:
        logger.debug("memos: %s", error)


def _join_control_plane(settings: ServerSettings) -> ControlPlane:
    """The actors that this server's supervisor has started.

    Raises:
        ConfigurationError: there is no supervisor, or its control plane did not start.
    """
    run = run_in_environment()
    if run is None:
        raise ConfigurationError(
            "memory needs its control plane, which `memos-vllm serve` starts: start the server "
            "with it instead of `vllm serve`"
        )
    from memos_vllm.control.actors import ControlPlane, join_ray

    address = wait_for_address(settings.run_dir, run, seconds=_CONTROL_PLANE_SECONDS)
    join_ray(address.ray)
    return ControlPlane(address.namespace)


def _principal(request: Request) -> Principal:
    return principal_in(request.scope)


def _connector_is_ours(vllm_config: Any) -> bool:
    config = vllm_config.kv_transfer_config
    return config is not None and config.has_connector(CONNECTOR_NAME)


def _traits(serving: OpenAIServingChat) -> TemplateTraits:
    template = TokenizerTemplate(
        serving.renderer.tokenizer,
        chat_template=serving.chat_template,
        variables=serving.default_chat_template_kwargs,
    )
    try:
        return probe_template(template)
    except TemplateError as error:
        logger.warning("memos: the chat template could not be probed: %s", error)
        return TemplateTraits(Placement.SYSTEM)
