"""Techniques, a file each: what is registered here, the whole study knows by name."""
