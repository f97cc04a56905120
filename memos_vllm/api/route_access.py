"""Who may use which route of the running app, vLLM's own included: one table.

What the table does not name is for administrators, so that a route of a later vLLM is closed until
somebody has looked at it. A test holds the table to the routes of vLLM's real app.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from starlette.routing import Match
from starlette.types import Scope


class Audience(StrEnum):
    EVERYBODY = "everybody"
    PRINCIPALS = "principals"
    ADMINISTRATORS = "administrators"


# Load balancers ask it without a key; it tells which parts are ready and nothing else.
HEALTH_PATH = "/health"

# Exactly these, and for those that end in a slash whatever is below.
PRINCIPAL_PATHS = frozenset(
    {
        # Our own: access to what they name is decided in the catalog's queries.
        "/v1/jobs/",
        "/v1/keys",
        "/v1/keys/",
        "/v1/memcubes",
        "/v1/memcubes/",
        "/v1/memos/status",
        "/v1/principals/me",
        # vLLM's: answers of the model, and what a client must know to ask for them.
        "/classify",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/detokenize",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
        "/tokenizer_info",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/models",
        # Its socket names only base models; an adapter is refused by vLLM itself.
        "/v1/realtime",
        "/v1/rerank",
        "/v1/responses",
        # Below it are stored answers, under ids that only their owner was told.
        "/v1/responses/",
        "/v1/responses/render",
        "/v1/score",
        "/v1/systemone",
        "/v2/embed",
        "/v2/rerank",
        # For monitoring and for readers of the documentation.
        "/docs",
        "/docs/oauth2-redirect",
        "/load",
        "/metrics",
        "/metrics/",
        "/openapi.json",
        "/ping",
        "/redoc",
        "/static",
        "/static/",
        "/version",
    }
)
_BELOW = tuple(sorted(path for path in PRINCIPAL_PATHS if path.endswith("/")))

# Only for the test and for readers: these are closed to others because they are not above.
ADMINISTRATOR_PATHS = frozenset(
    {
        # How long the whole log is tells of everybody.
        "/v1/audit",
        "/v1/audit/export",
        "/v1/audit/verify",
        # They end, hold up or measure everybody's requests.
        "/abort_requests",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/get_world_size",
        "/inference/v1/abort_requests",
        "/is_paused",
        "/is_scaling_elastic_ep",
        "/is_sleeping",
        "/kv_event_sources",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/server_info",
        "/sleep",
        "/start_profile",
        "/stop_profile",
        "/wake_up",
        # They change what the model is.
        "/adapters",
        "/adapters/{adapter_name}",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_draft_weight_update",
        "/start_weight_update",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/weight_checker",
        "/weight_info",
    }
)


def audience(path: str, method: str | None) -> Audience:
    """Who may use what is at this path.

    Args:
        path: decoded, without `--root-path`; spelled as the router will match it.
        method: None for a socket.
    """
    if path == HEALTH_PATH and method in {"GET", "HEAD"}:
        return Audience.EVERYBODY
    if path in PRINCIPAL_PATHS or path.startswith(_BELOW):
        return Audience.PRINCIPALS
    return Audience.ADMINISTRATORS


def leads_somewhere(scope: Scope) -> bool:
    """Whether the app has a route for this request, with whatever method."""
    app: Any = scope["app"]
    return any(route.matches(scope)[0] is not Match.NONE for route in app.router.routes)
