"""What the runs say: scores, claims, figures, tables."""
