"""From a raw data set to nnU-Net's plan and preprocessed cases, labeled and unlabeled."""
