"""The data engine: rounds of training, proposing and accepting."""
