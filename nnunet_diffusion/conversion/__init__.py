"""From files of any layout to a raw data set of nnU-Net."""
