"""The HTTP surface: routes, schemas, the error table and the request guard.

Nothing here imports vllm or torch; `memos_vllm.engine` attaches it to vLLM's own FastAPI app.
"""
