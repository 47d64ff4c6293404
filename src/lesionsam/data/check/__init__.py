"""`lesionsam data check`: list images, inspect each, write a page."""
