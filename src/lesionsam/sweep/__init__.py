"""Optuna: the search space, trials, workers and the comparison of winner and start."""
