"""Configuration to objects to a trained model: where configuration stops."""
