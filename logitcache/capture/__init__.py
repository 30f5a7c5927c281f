"""Prompts or texts become a cache: generate, score, and the plan of a job."""
