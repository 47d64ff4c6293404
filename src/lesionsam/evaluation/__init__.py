"""Masks to tables: per image, by stratum, with intervals and baselines."""
