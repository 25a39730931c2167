"""Learning from a pool without labels: an averaged teacher, a student that sees strong views, copy-paste."""
