"""A model in vLLM: what its files say, the engine, the capture hooks."""
