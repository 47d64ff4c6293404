"""The annotation page: two boxes per lesion drawn in a browser, saved at once, on one's own machine."""
