"""A diffusion teacher and a student on a pool without labels."""
