"""Measures accuracy under reasoning budgets."""
