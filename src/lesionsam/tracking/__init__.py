"""MLflow: values go to a journal first, a process of its own sends them."""
