"""`python -m fusevm` is the `fuse` command."""

from fusevm.cli.main import main

main()
