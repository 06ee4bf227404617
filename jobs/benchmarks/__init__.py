"""What `jobs/benchmark.py` measures, a file a subject."""
