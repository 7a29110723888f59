"""Synthetic images: the text-to-image model, techniques, pools."""
