"""`python -m vidgen` is the command line."""

from vidgen.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
