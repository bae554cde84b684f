"""Ways of training: imbalance, balance between modalities, task weighting, augmentation, transfer."""
