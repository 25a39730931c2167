"""Losses that know tensors, not data sets."""
