"""`GET /v1/models` with what the caller may use."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from memos_vllm.api.authentication import principal_in
from memos_vllm.api.model_access import is_adapter


async def list_models(request: Request) -> Response:
    """vLLM's own list; adapters of ours are shown to administrators only."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    if not principal_in(request.scope).admin:
        listed.data = [card for card in listed.data if not is_adapter(card.id)]
    return JSONResponse(listed.model_dump())
