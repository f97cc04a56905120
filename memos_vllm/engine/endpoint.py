"""The endpoint plugin: memory on vLLM's own HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from argparse import Namespace
from collections.abc import Awaitable, Mapping
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
from memos_vllm.api.error_table import error_response
from memos_vllm.api.middleware import MemosGuard, guard_listeners
from memos_vllm.api.routes import build_router
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.job import JobKind
from memos_vllm.engine import assembly
from memos_vllm.engine.baker import Baker
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.engine.composing import Composer
from memos_vllm.engine.gateway import VllmGateway
from memos_vllm.engine.job_runner import JobRunner
from memos_vllm.engine.names import CONNECTOR_NAME, MIDDLEWARE, PLUGIN_NAME
from memos_vllm.engine.options import parse_cube_ids, parse_options
from memos_vllm.engine.protocol import MemoryChatRequest
from memos_vllm.engine.reader import Reader
from memos_vllm.engine.recall import Recall
from memos_vllm.engine.reindexer import Reindexer
from memos_vllm.engine.remembering import TurnWriter
from memos_vllm.engine.secrets import ServerKeys, load_keys
from memos_vllm.engine.stats import count_guard_event
from memos_vllm.engine.template import TokenizerTemplate, special_tokens_of
from memos_vllm.engine.ticket import TicketSigner
from memos_vllm.engine.usage import UsageRecorder
from memos_vllm.errors import ConfigurationError, MemosError, TemplateError, Unavailable
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.store import PlaintextStore

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.tasks import SupportedTask

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """What the routes use once the server has started."""

    mos: Mos
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
        cubes."""
        if MIDDLEWARE not in getattr(app.state.args, "middleware", ()):
            app.add_middleware(MemosGuard)
        app.include_router(
            build_router(
                mos=lambda: self._started().mos,
                plaintext=lambda: self._started().plaintext,
                gateway=lambda: self._started().gateway,
                principal=_principal,
                tombstone_key=lambda: self._started().keys.tombstone,
            )
        )
        app.add_api_route(
            "/v1/chat/completions",
            self._chat_route(),
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            summary="Chat, with the memory of cubes when memcube_id names any",
            tags=["chat"],
            responses={200: {"content": {"text/event-stream": {}}}},
        )

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Open the catalog and the store, and start the background work."""
        serving: OpenAIServingChat | None = getattr(state, "openai_serving_chat", None)
        if engine_client is None or serving is None:
            return
        refuse_open_doors(args)
        vllm_config = engine_client.vllm_config
        if not _connector_is_ours(vllm_config):
            raise ConfigurationError(
                "the memos plugin needs its connector: start with `memos-vllm serve`, or pass "
                "--kv-transfer-config as the README shows"
            )
        if getattr(args, "disable_log_stats", False):
            logger.warning(
                "memos: without engine statistics (--disable-log-stats) the resident tokens show "
                "as 0, and a bake whose save failed ends only when its time is up"
            )
        settings = assembly.settings_of(vllm_config)
        keys = load_keys(settings.secrets_dir)
        mos = await asyncio.to_thread(Mos.open, settings.resolved_catalog_url)
        signer = TicketSigner(keys.ticket, ttl_seconds=settings.ticket_ttl_seconds)
        usage = UsageRecorder(mos)
        fingerprint = await asyncio.to_thread(assembly.fingerprint_of, vllm_config)
        numerics = assembly.numerics_of(vllm_config)
        store = assembly.open_store(vllm_config, budget=False)

        def record_later(snapshot: CubeSnapshot, head: list[int], kept_tokens: int) -> None:
            baker.record_later(snapshot, head, kept_tokens)

        def wake() -> None:
            plaintext.wake()
            jobs.wake()

        special_tokens = special_tokens_of(serving.renderer.tokenizer)
        composer = Composer(serving, _traits(serving), special_tokens)
        plaintext = open_plaintext(settings, mos)
        plaintext.start()
        chat = MemoryChat(
            mos=mos,
            serving=serving,
            keys=keys,
            signer=signer,
            composer=composer,
            recall=Recall(plaintext, count_tokens=composer.count_note_tokens),
            writer=TurnWriter(mos, on_written=wake),
            on_usage=usage.note,
            on_served=record_later,
        )
        baker = Baker(
            mos=mos,
            chat=chat,
            store=store,
            identity=lambda scope: PrefixIdentity(
                scope, fingerprint.digest, numerics, RENDERER_VERSION
            ),
        )
        reader = Reader(
            mos=mos, plaintext=plaintext, serving=serving, special_tokens=special_tokens
        )
        jobs = JobRunner(
            mos,
            {
                JobKind.BAKE: baker.bake,
                JobKind.REBUILD: baker.bake,
                JobKind.EXTRACT: reader.extract,
                JobKind.REINDEX: Reindexer(mos, plaintext).reindex,
            },
        )
        gateway = VllmGateway(
            engine=engine_client,
            mos=mos,
            chat=chat,
            jobs=jobs,
            plaintext=plaintext,
            store=store,
            fingerprint=fingerprint,
            numerics=numerics,
            settings=settings,
        )
        if count_guard_event not in guard_listeners:
            guard_listeners.append(count_guard_event)
        tasks = [
            asyncio.create_task(work)
            for work in (
                _forget_then_run(baker, jobs),
                usage.run(),
                _quietly(chat.warm_up()),
                _close_at_the_end(plaintext),
            )
        ]
        self._running = _Running(mos, chat, gateway, plaintext, keys, tasks)
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


async def _close_at_the_end(plaintext: PlaintextStore) -> None:
    """Let go of the index when the server stops: its folder is then whole without a repair."""
    try:
        await asyncio.Event().wait()
    finally:
        plaintext.close()


async def _quietly(work: Awaitable[None]) -> None:
    """For work that nobody waits for, and that is done again when it is needed."""
    try:
        await work
    except MemosError as error:
        logger.debug("memos: %s", error)


def refuse_open_doors(args: Namespace) -> None:
    """Refuse to serve everyone: there are no keys yet, whoever connects is the administrator.

    Raises:
        ConfigurationError: the reason, and what to do instead.
    """
    if getattr(args, "uds", None) is None and not is_loopback(args.host):
        shown = args.host or "every address (vLLM's default)"
        raise ConfigurationError(
            f"memory has no keys yet, so anyone who reaches the server could read it: it serves "
            f"only this machine, not {shown}; pass --host 127.0.0.1"
        )
    if getattr(args, "api_key", None):
        raise ConfigurationError(
            "--api-key guards only part of vLLM's routes and knows one principal; memory comes "
            "with keys of its own in a later release, until then leave it out"
        )
    if getattr(args, "grpc_port", None) is not None or getattr(args, "grpc", False):
        raise ConfigurationError("gRPC would go past the checks on memory; leave it out")


def is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _principal(_: Request) -> Principal:
    """A loopback-only server has one user; keys come with the control plane."""
    return LOCAL_ADMIN


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
