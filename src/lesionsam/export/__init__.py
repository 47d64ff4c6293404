"""Export weights for other tools; each export is reloaded and compared."""
