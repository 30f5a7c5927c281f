"""Whole experiments: variants, seeds, evaluation and a report."""
