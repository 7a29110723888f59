"""Subject-driven data augmentation: the steps that the study's notebooks share."""
