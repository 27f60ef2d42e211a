"""Entry point of `python -m sartor`, which is the command `sartor`."""

from sartor.cli import main

main()
