"""Rounds of pseudo labels: predict the pool, filter, train on it, again."""
