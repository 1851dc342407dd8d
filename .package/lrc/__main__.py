"""`python -m lrc` is `lrc`."""

from lrc.cli.main import main

main()
