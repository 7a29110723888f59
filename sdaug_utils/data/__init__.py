"""Real images: data sets, classical transforms, control images."""
