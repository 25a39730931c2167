"""Label-efficient segmentation as an nnU-Net plug-in: learn the planned network from every scan there is."""

__version__ = "0.1.0"
