"""`python -m fastdit`."""

from fastdit.cli import main

main()
