"""`python -m lesionsam` is `lesionsam`."""

from lesionsam.cli import main

main()
