"""Weights for other tools; each export is read back and compared."""
