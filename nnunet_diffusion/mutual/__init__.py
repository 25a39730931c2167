"""Mutual learning between networks of differently annotated groups."""
