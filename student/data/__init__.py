"""Views of a trace, datasets and batches."""
