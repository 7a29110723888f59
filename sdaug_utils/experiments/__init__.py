"""The experiments, a file each: what a notebook sets, asks for and checks."""
