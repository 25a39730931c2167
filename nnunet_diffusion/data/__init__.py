"""Cases, their labels and the unlabelled pool."""
