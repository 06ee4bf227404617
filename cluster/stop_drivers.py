"""Before a head node goes (preStop of its pod): every job that runs there gets the SIGTERM it would not see otherwise.

Ray kills the entry points of its jobs together with the node, without a signal. A driver that gets SIGTERM flushes
within 2 seconds, releases its lease, so that the next one starts at once, and exits with 130: the job is FAILED, not
STOPPED, and a RayJob with a `backoffLimit` makes a new cluster and resumes. Refuses to know what the jobs are.

    python cluster/stop_drivers.py [http://127.0.0.1:8265]
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from ray.job_submission import JobSubmissionClient

LONGEST_SECONDS = 10.0
"""Five times what a driver takes."""


def main(address: str) -> int:
    """Signals the drivers of this node's jobs and waits until they are gone; 1 if one is not."""
    client = JobSubmissionClient(address)
    running = [job for job in client.list_jobs() if job.driver_info and not job.status.is_terminal()]
    waiting = {int(job.driver_info.pid) for job in running}
    for pid in waiting:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + LONGEST_SECONDS
    while waiting and time.monotonic() < end:
        time.sleep(0.1)
        waiting = {pid for pid in waiting if os.path.exists(f"/proc/{pid}")}
    print(f"{len(running)} drivers asked to stop, {len(waiting)} still there", flush=True)
    return 1 if waiting else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265"))
