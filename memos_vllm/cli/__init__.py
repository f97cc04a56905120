"""The command line `memos-vllm`."""
