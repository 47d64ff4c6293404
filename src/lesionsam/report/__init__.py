"""The HTML report, the model card and the comparison of runs."""
