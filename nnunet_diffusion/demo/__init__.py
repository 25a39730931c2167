"""Synthetic scans to try everything on."""
