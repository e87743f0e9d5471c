"""`python -m fmoe`: the command line."""

from fmoe.cli import main

main()
