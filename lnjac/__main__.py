"""`python -m lnjac` is `lnjac`."""

from lnjac.cli.main import main

main()
