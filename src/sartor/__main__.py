"""`python -m sartor` is the command `sartor`."""

from sartor.cli import main

main()
