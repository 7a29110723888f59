"""Models that learn from real and synthetic images."""
