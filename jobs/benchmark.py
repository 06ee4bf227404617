"""Measurements: `python jobs/benchmark.py MODE`. Prints what it measured beside what it compares with; asserts nothing.

Modes are subcommands, one function each.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidgen.config import from_dict
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store.objects import Objects

SUBJECTS = ("fox", "river", "old lighthouse", "paper boat", "market at dusk", "dancer", "glass city", "snowfield")


def plan(arguments: argparse.Namespace) -> None:
    """Plans `rows` prompts of the test card into a local folder: rows/s, peak memory, bytes of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "prompts.parquet")
        _write_prompts(source, arguments.rows, arguments.ids)
        before = _peak_rss()
        config = from_dict(
            {
                "model": {"family": arguments.family},
                "dataset": {"path": str(source), "id_column": "id" if arguments.ids else None},
                "output": {"path": f"{folder}/output"},
            }
        )
        objects = Objects(config.output.path)
        started = time.perf_counter()
        result = build(config, objects)
        seconds = time.perf_counter() - started
        peak = _peak_rss()
        size = sum(entry.size for entry in objects.list("plan"))
        print(
            f"plan: {arguments.rows:,} rows in {seconds:.1f} s = {arguments.rows / seconds:,.0f} rows/s, "
            f"peak RSS {peak:,.0f} MiB ({before:,.0f} before), {size / 2**20:,.1f} MiB of plan in "
            f"{len(result.plan.parts)} parts"
        )
        started = time.perf_counter()
        items = sum(1 for part in result.plan.parts for _ in read_items(objects, result.plan, part))
        seconds = time.perf_counter() - started
        print(f"read: {items:,} items in {seconds:.1f} s = {items / seconds:,.0f} items/s")


def dispatch(arguments: argparse.Namespace) -> None:
    """Items/s through the whole path with commits, beside Ray Data's map_batches writing the same bytes."""
    import ray

    from vidgen.fleet import run as fleet
    from vidgen.store import ledger

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "prompts.parquet")
        _write_prompts(source, arguments.items, ids=True)
        config = Path(folder, "job.yaml")
        config.write_text(
            f"model: {{family: testcard}}\ndataset: {{path: {source}, id_column: id}}\n"
            f"sampling: {{num_inference_steps: 1, params: {{ready: true}}}}\noutput: {{path: {folder}/output}}\n"
        )
        started = time.perf_counter()
        _, outcome = fleet.generate(str(config), [f"parallel.replicas={arguments.replicas}"], fleet.Options(quiet=True))
        whole = time.perf_counter() - started
        records = [r for table in ledger.read_tables(Objects(f"{folder}/output")) for r in ledger.to_records(table)]
        ours = _rate([record.created_at for record in records])
        batches = {record.batch for record in records}
        print(
            f"vidgen: {outcome.counts['done']:,} items, {ours:,.0f} items/s with commits "
            f"({whole:.1f} s in all, cluster start, plan and manifest included; batches up to {max(batches)})"
        )
        if importlib.util.find_spec("pandas") is None:
            print("ray data: not measured, it needs pandas (pip install pandas)")
            return
        data = Objects(f"{folder}/output").read(records[0].video)
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        started = time.perf_counter()
        times = _ray_data(source, f"{folder}/raydata", data, arguments.replicas)
        whole = time.perf_counter() - started
        theirs = _rate(times)
        ray.shutdown()
        print(f"ray data: {len(times):,} items, {theirs:,.0f} items/s without commits ({whole:.1f} s in all)")
        print(f"ratio: {ours / theirs:.2f}")


def _ray_data(source: Path, folder: str, data: bytes, replicas: int) -> list[float]:
    """Ray Data's way to do it: read Parquet, an actor pool writes ready bytes, a file a row. Times of writing."""
    import ray.data

    class Write:
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            times = []
            for name in batch["id"]:
                Objects(folder).put(f"{name}.mp4", data)
                times.append(time.time())
            return {"at": np.array(times)}

    rows = ray.data.read_parquet(str(source))
    made = rows.map_batches(Write, concurrency=replicas, batch_size=32, num_cpus=0.5)
    return [float(row["at"]) for row in made.iter_rows()]


def _rate(times: list[float]) -> float:
    """Items a second between the first and the last."""
    return (len(times) - 1) / (max(times) - min(times))


def _write_prompts(path: Path, rows: int, ids: bool) -> None:
    """A Parquet file of different prompts of 60 to 200 characters, in row groups of 65,536."""
    random = np.random.default_rng(0)
    columns = ["id", "prompt", "topic"] if ids else ["prompt", "topic"]
    kinds = {"id": pa.string(), "prompt": pa.string(), "topic": pa.string()}
    schema = pa.schema([(name, kinds[name]) for name in columns])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, 65_536):
            count = min(65_536, rows - first)
            subjects = [SUBJECTS[i] for i in random.integers(0, len(SUBJECTS), count)]
            lengths = random.integers(2, 9, count).tolist()
            values = {
                "id": [f"clip-{first + i:09d}" for i in range(count)],
                "prompt": [
                    f"a slow dolly shot of a {subject}, take {first + i}" + ", soft morning light" * length
                    for i, (subject, length) in enumerate(zip(subjects, lengths, strict=True))
                ],
                "topic": subjects,
            }
            writer.write_table(pa.table([pa.array(values[name]) for name in columns], schema=schema))


def _peak_rss() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)

    def mode(function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = modes.add_parser(function.__name__.replace("_", "-"), help=(function.__doc__ or "").split("\n")[0])
        added.set_defaults(function=function)
        return added

    planning = mode(plan)
    planning.add_argument("--rows", type=int, default=1_000_000)
    planning.add_argument("--family", default="testcard")
    planning.add_argument("--ids", action="store_true", help="with an id column instead of content hashes")

    dispatching = mode(dispatch)
    dispatching.add_argument("--items", type=int, default=10_000)
    dispatching.add_argument("--replicas", type=int, default=2)

    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
