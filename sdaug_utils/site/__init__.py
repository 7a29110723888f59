"""A profile's executed notebooks, figures, verdicts and pools as one static site."""
