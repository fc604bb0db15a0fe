"""`python -m services` is `tranche`."""

from services.cli import main

main()
