"""The command line: `lesionsam ...`."""
