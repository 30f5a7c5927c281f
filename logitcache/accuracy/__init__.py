"""Answers under reasoning budgets, and how many of them are right."""
