"""SAM: published and compact, which of its parts train, and what is added to it."""
