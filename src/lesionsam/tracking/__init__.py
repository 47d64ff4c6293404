"""Track runs in MLflow: values go to a journal, and a separate process sends them."""
