"""Atomic files, locks and the terminal: what every command stands on."""
