"""Which names of models a caller may use: the served ones everybody, adapters of ours nobody yet.

An adapter holds what a cube holds, so its name must not be a way around the cube. Whether such an
adapter exists is not looked at: to everyone but administrators the whole namespace is empty.
"""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope

from memos_vllm.errors import UnknownModel

ADAPTER_PREFIX = "memos-"
"""Starts the name of every adapter that this server makes, and of no served model."""

ADAPTER_IN_JSON = re.compile(rb"memos(?:-|\\u002[dD])")
"""What the body of a request that names one holds, unless letters are escaped."""

# vLLM puts it in the place of `model` on /invocations.
_ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"


def is_adapter(model: object) -> bool:
    """Whether a name belongs to an adapter of ours."""
    return isinstance(model, str) and model.startswith(ADAPTER_PREFIX)


def refuse_adapter(model: object) -> None:
    """Raises UnknownModel for the name of an adapter of ours."""
    if isinstance(model, str) and is_adapter(model):
        raise UnknownModel(model)


def refuse_adapter_in_headers(scope: Scope) -> None:
    """Raises UnknownModel when a header names an adapter of ours."""
    for name, value in scope["headers"]:
        if name.lower() == _ADAPTER_HEADER:
            refuse_adapter(value.decode("latin-1").strip())


async def refuse_adapter_in_form(scope: Scope, body: bytes, receive: Receive) -> None:
    """Raises UnknownModel when a form names an adapter of ours; it is read as its route will."""
    kind = b" ".join(value for name, value in scope["headers"] if name.lower() == b"content-type")
    plain = b"charset" not in kind.lower() and b"urlencoded" not in kind.lower()
    if plain and ADAPTER_PREFIX.encode() not in body:
        return
    try:
        async with Request(scope, receive).form() as form:
            for model in form.getlist("model"):
                refuse_adapter(model)
    except HTTPException:
        # Its route cannot read it either, and says so.
        return


def unknown_model_response(error: UnknownModel, scope: Scope) -> JSONResponse:
    """What vLLM answers for a model that it does not serve, to the letter."""
    args = scope["app"].state.args
    served = ", ".join(args.served_model_name or [args.model])
    return JSONResponse(
        {
            "error": {
                "message": f"The model `{error.identifier}` does not exist. "
                f"Valid aliases: {served}.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        },
        status_code=404,
    )
