"""Images drawn from a denoiser, and figures of how real they are."""
