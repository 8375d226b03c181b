"""`python -m explaind` is the command line."""

from explaind.cli import main

main(prog_name="explaind")
