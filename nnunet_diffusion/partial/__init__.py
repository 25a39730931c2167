"""Learning from cases that are annotated for some labels only."""
