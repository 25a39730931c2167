"""Denoising diffusion pre-training of the planned network, and its transfer."""
