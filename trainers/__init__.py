"""Trainers that nnU-Net finds through `nnUNet_extTrainer`."""
