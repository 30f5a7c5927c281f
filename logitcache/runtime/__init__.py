"""Atomic files, locks, the terminal, and the declaration of options."""
