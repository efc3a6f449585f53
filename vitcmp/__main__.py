"""`python -m vitcmp` is the command `vitcmp`."""

from vitcmp.cli import main

main()
