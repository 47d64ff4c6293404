"""Image and prompt to mask: in Python, over folders, and without a prompt."""
