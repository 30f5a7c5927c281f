"""Caches made from caches, without the teacher: slice, merge, split."""
