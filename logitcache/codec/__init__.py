"""Sparse rows <-> bytes."""

from logitcache.codec.rows import decode, encode

__all__ = ["decode", "encode"]
