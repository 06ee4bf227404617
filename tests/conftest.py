"""Before torch is first imported: one thread a process, and no spinning. Two processes that spin on two cores slow each
other tenfold; results are bit for bit at a fixed number of threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
