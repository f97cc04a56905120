"""Plaintext memory: what is found by search and put into the prompt."""
