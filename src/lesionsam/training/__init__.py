"""The training loop, its optimiser, its states on disk and its recovery from faults."""
