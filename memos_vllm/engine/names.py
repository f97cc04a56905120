"""Names by which vLLM knows us; importable without vLLM."""

PLUGIN_NAME = "memos"
CONNECTOR_NAME = "MemCubeConnector"
MIDDLEWARE = "memos_vllm.api.middleware.MemosGuard"
