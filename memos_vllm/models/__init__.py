"""Fetching models and turning them into folders that vLLM serves."""
