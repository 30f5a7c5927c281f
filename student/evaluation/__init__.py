"""Compares students with their teacher, and runs with each other."""
