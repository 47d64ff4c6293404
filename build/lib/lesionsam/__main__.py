"""`python -m lesionsam` is `lesionsam`."""

from lesionsam.cli.app import main

main()
