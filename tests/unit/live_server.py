"""The real routes over a real catalog on a loopback port, with a fake engine and a fake chat."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import client_fakes as fakes
import uvicorn
from api_harness import FakeGateway, build_app
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memos_vllm.control.mos import Mos
from memos_vllm.domain.job import JobState

ANSWER = ["Refunds take ", "five working days", "."]


@dataclass
class LiveServer:
    url: str
    mos: Mos
    gateway: FakeGateway
    chats: list[Any] = field(default_factory=list)
    job_failure: str | None = None
    # Seconds between two deltas of a streamed answer.
    pace_seconds: float = 0.0

    def finish_jobs(self) -> None:
        """What the engine's worker would do, in a thread of its own so that jobs are waited for."""

        def work() -> None:
            while (job := self.mos.claim_job("worker", lease_seconds=30)) is not None:
                self.mos.renew_job(job.id, "worker", lease_seconds=30, progress=0.5, message="half")
                time.sleep(0.1)
                failed = self.job_failure is not None
                self.mos.finish_job(
                    job.id,
                    "worker",
                    state=JobState.FAILED if failed else JobState.SUCCEEDED,
                    message="baked",
                    error=self.job_failure,
                )

        threading.Thread(target=work, daemon=True).start()


def _add_fake_chat(app: FastAPI, live: LiveServer) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "fake-model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        live.chats.append(body)
        if not body.get("stream"):
            return JSONResponse(fakes.chat_json("".join(ANSWER)))
        return StreamingResponse(stream(), media_type="text/event-stream")

    async def stream() -> AsyncIterator[str]:
        import asyncio

        for text in ANSWER:
            yield f"data: {json.dumps(fakes.delta_json(text))}\n\n"
            await asyncio.sleep(live.pace_seconds)
        yield f"data: {json.dumps({'choices': [], 'memos': fakes.MEMOS_JSON})}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def live_server(folder: Path) -> Iterator[LiveServer]:
    mos = Mos.open(f"sqlite:///{folder}/catalog.sqlite")
    gateway = FakeGateway()
    app = build_app(lambda: mos, lambda: gateway)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    live = LiveServer(url="", mos=mos, gateway=gateway)
    gateway.on_wake = live.finish_jobs
    _add_fake_chat(app, live)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        live.url = f"http://127.0.0.1:{port}"
        yield live
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        mos.close()
