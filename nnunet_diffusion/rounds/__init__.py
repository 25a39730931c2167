"""Rounds of pseudo labels: predict the pool, keep what can be believed, train on it, again."""
