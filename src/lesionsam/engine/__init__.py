"""Data engine: rounds of training, proposing and accepting."""
