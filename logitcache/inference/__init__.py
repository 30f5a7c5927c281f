"""Runs a model in vLLM: its files, the engine, and hooks that capture rows."""
