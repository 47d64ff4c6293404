"""`lesionsam data check`: find items, look at each, write a page."""
