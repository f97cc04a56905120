"""vLLM's entry points into this package.

`vllm.general_plugins` runs `register` in every process of vLLM, possibly more than once;
`vllm.endpoint_plugins` runs `endpoint_plugin` in the API server when `VLLM_PLUGINS` names us.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memos_vllm.engine.names import CONNECTOR_NAME

if TYPE_CHECKING:
    from memos_vllm.engine.endpoint import MemosEndpoint


def register() -> None:
    """Make `--kv-transfer-config '{"kv_connector": "MemCubeConnector", ...}'` work."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    _log_like_vllm()
    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR_NAME)
    except ValueError:
        KVConnectorFactory.register_connector(
            CONNECTOR_NAME, "memos_vllm.engine.connector", "MemCubeConnector"
        )


def _log_like_vllm() -> None:
    """Send our log lines where vLLM's go, once per process."""
    ours, vllms = logging.getLogger("memos_vllm"), logging.getLogger("vllm")
    if not ours.handlers and vllms.handlers:
        ours.handlers = list(vllms.handlers)
        ours.setLevel(vllms.level)
        ours.propagate = False


def endpoint_plugin() -> MemosEndpoint:
    """The plugin object that adds memory to vLLM's HTTP server."""
    from memos_vllm.engine.endpoint import MemosEndpoint

    # The API server need not have run `register`.
    _log_like_vllm()
    return MemosEndpoint()
