"""SAM, published and compact: loading, running, and selecting or adding trained parts."""
