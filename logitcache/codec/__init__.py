"""Encodes sparse rows as bytes and decodes them."""

from logitcache.codec.rows import decode, encode

__all__ = ["decode", "encode"]
