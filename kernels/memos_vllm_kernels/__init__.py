"""Move KV between vLLM's pages and the canonical token-major layout, bit for bit.

Canonical: `[layers, 2, tokens, kv_heads, head_dim]` in the cache dtype, keys first. Pages: one
tensor `[num_blocks, kv_heads, block_size, 2 * head_dim]` a layer, plain or packed for a CPU.
Importing this package imports torch, but neither triton nor vllm.
"""

from memos_vllm_kernels.buffers import tensor_over
from memos_vllm_kernels.errors import KernelInputError, UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry
from memos_vllm_kernels.pages import KvPages, export_tokens, import_tokens, slot_mapping
from memos_vllm_kernels.support import supported
from memos_vllm_kernels.threads import unpin_thread, unpinned_thread

__all__ = [
    "KernelInputError",
    "KvPages",
    "Packing",
    "PageGeometry",
    "UnsupportedLayout",
    "export_tokens",
    "import_tokens",
    "slot_mapping",
    "supported",
    "tensor_over",
    "unpin_thread",
    "unpinned_thread",
]
