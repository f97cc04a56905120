"""Activation memory: prompts whose KV is computed once and kept."""
