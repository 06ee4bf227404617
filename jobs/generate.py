"""The main job, `vidgen generate`: `python jobs/generate.py CONFIG key=value`, or what `ray job submit` runs."""

import sys

from vidgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
