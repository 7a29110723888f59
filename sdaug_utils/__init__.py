"""Subject-driven data augmentation: the steps that the study's notebooks share."""

import warnings

# Progress bars are plain text here: no widgets, so that notebooks stay small.
warnings.filterwarnings("ignore", message="IProgress not found")
