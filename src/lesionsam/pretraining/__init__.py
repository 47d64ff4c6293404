"""Pretraining of the compact SAM on generated shapes."""
