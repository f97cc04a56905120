"""Move KV between vLLM's pages and the canonical token-major layout, bit for bit.

Canonical: `[layers, halves, tokens, kv_heads, head_dim]` in the cache dtype, keys first, or a row
of bytes instead of `head_dim` numbers where an `Encoding` makes them smaller. Pages: one tensor a
layer in vLLM's logical axes, arranged as `Packing` says. Importing this package imports torch, but
neither triton nor vllm.
"""

from memos_vllm_kernels.buffers import tensor_over
from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.errors import KernelInputError, UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry
from memos_vllm_kernels.moves import export_blocks, import_blocks, slot_mapping
from memos_vllm_kernels.pages import KvPages
from memos_vllm_kernels.rotary import RotaryTable, Rotation
from memos_vllm_kernels.staging import PageMover
from memos_vllm_kernels.support import supported
from memos_vllm_kernels.threads import unpin_thread, unpinned_thread

__all__ = [
    "Encoding",
    "KernelInputError",
    "KvPages",
    "Packing",
    "PageGeometry",
    "PageMover",
    "RotaryTable",
    "Rotation",
    "UnsupportedLayout",
    "export_blocks",
    "import_blocks",
    "slot_mapping",
    "supported",
    "tensor_over",
    "unpin_thread",
    "unpinned_thread",
]
