"""params.yaml: its schema, its rules, presets, and edits that keep its comments."""
