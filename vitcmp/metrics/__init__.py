"""Measures: they return values, and never print."""
