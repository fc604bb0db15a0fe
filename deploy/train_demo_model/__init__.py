"""Owns the training of the shipped demo model: plays in, a loadable model folder out."""
