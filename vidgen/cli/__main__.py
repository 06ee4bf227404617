"""`python -m vidgen.cli`: the `vidgen` command where no script is installed."""

import sys

from vidgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
