"""`python -m lnjac` is `lnjac`."""

from lnjac.cli import main

main()
