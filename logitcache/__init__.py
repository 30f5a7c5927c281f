"""logitcache: run the teacher once, keep what it thought at every token, train as many students as you like from disk."""

__version__ = "0.1.0"
