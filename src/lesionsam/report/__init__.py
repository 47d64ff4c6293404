"""HTML report, model card and comparison of runs."""
