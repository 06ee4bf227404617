"""Batch video generation at dataset scale. See README.md; `vidgen.engine` is the way in from Python."""

VERSION = "0.1.0"
"""Read by pyproject.toml, so that a copy that was never installed (a job's working directory) knows it too."""
