"""Conversions of published data sets, one script each."""
