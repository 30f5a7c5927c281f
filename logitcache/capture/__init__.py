"""Makes caches from prompts or texts: generate, score, and plan."""
