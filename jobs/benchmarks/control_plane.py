"""What planning, dispatching and resuming cost: rows, items and commits a second, requests, memory."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import manifest
from vidgen.config import from_dict
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store import commits, ledger, state
from vidgen.store.objects import Objects, new_token
from vidgen.types import Record

LEDGER_RECORDS = 5_000
"""Commits of a ledger part, as a driver writes them."""
SUBJECTS = ("fox", "river", "old lighthouse", "paper boat", "market at dusk", "dancer", "glass city", "snowfield")


def plan(arguments: argparse.Namespace) -> None:
    """Plans `rows` prompts of the test card into a local folder, and writes the manifest of a run that settled them in
    any order: rows/s, peak memory, bytes of the plan."""
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
        ids = [item.item_id for part in result.plan.parts for item in read_items(objects, result.plan, part)]
        seconds = time.perf_counter() - started
        print(f"read: {len(ids):,} items in {seconds:.1f} s = {len(ids) / seconds:,.0f} items/s")
        parts = _settle(objects, ids)
        held = state.load(objects, len(ids))
        started = time.perf_counter()
        manifest.write(objects, [result.plan], held, new_token())
        seconds = time.perf_counter() - started
        print(
            f"manifest: {len(ids):,} rows of {parts:,} ledger parts in {seconds:.1f} s = "
            f"{len(ids) / seconds:,.0f} rows/s, peak RSS {_peak_rss():,.0f} MiB"
        )


def _settle(objects: Objects, ids: list[str]) -> int:
    """A ledger of these items, settled in a random order; returns its parts."""
    order = np.random.default_rng(0).permutation(len(ids)).tolist()
    for first in range(0, len(order), LEDGER_RECORDS):
        settled = order[first : first + LEDGER_RECORDS]
        ledger.write_part(
            objects,
            [Record(ids[n], n, "done", 0, 1, video=commits.video_path(ids[n], ids[n], "mp4")) for n in settled],
        )
    return -(-len(order) // LEDGER_RECORDS)


def dispatch(arguments: argparse.Namespace) -> None:
    """Items/s through the whole path with commits, beside Ray Data's map_batches writing the same bytes."""
    import ray

    from vidgen.fleet import run as fleet

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


def resume(arguments: argparse.Namespace) -> None:
    """Opens a run of many commits as a driver does after a crash: seconds, requests, peak memory.

    Once as a killed driver leaves it, its last commits in no ledger part, and once without any ledger. `--output` is
    an empty place (default: a folder of this machine), such as s3://bucket/run with AWS_ENDPOINT_URL of a moto server.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects = Objects(arguments.output or folder)
        started = time.perf_counter()
        _fill(objects, arguments.commits, arguments.loose)
        where = "local disk" if objects.local else arguments.output
        print(f"resume: {arguments.commits:,} commits on {where}, made in {time.perf_counter() - started:.0f} s")
        _measure_resume(objects, arguments.commits, f"{arguments.loose:,} commits in no ledger part")
        for entry in objects.list("ledger"):
            objects.delete(entry.path)
        _measure_resume(objects, arguments.commits, "no ledger")


def _fill(objects: Objects, count: int, loose: int) -> None:
    """Commits and, but for the last `loose`, ledger parts of a run, without the checks that make writing them slow."""

    def write(one: Record) -> None:
        path, data = commits.commit_path(0, one.item_id), json.dumps({**one.to_dict(), "token": "t"}).encode()
        if objects.local:
            Path(objects.path(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(objects.path(path)).write_bytes(data)
        else:
            objects.put(path, data)

    for first in range(0, count, LEDGER_RECORDS):
        ordinals = range(first, min(first + LEDGER_RECORDS, count))
        ids = [hashlib.sha256(str(ordinal).encode()).hexdigest()[:32] for ordinal in ordinals]
        records = [
            Record(
                item_id, ordinal, "done", 0, 1, video=commits.video_path(item_id, item_id, "mp4"), sha256=item_id * 2
            )
            for ordinal, item_id in zip(ordinals, ids, strict=True)
        ]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write, records))
        named = [one for one in records if one.ordinal < count - loose]
        if named:
            ledger.write_part(objects, named)


def _measure_resume(objects: Objects, count: int, what: str) -> None:
    """In a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, before, peak, calls = pool.submit(_load, objects.url, count).result()
    asked = ", ".join(f"{number:,} {verb}" for verb, number in sorted(calls.items()))
    print(
        f"  {what}: {seconds:.1f} s = {count / seconds:,.0f} commits/s, peak RSS {peak:,.0f} MiB "
        f"({before:,.0f} before), "
        f"{sum(calls.values()):,} requests: {asked}"
    )


def _load(url: str, count: int) -> tuple[float, float, float, Counter[str]]:
    """Seconds, memory before and at most, and how often each verb of the store was used."""
    objects, calls = Objects(url), Counter[str]()
    objects.exists("plan/0/PLAN.json")  # opens the connection

    def counted(verb: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[verb] += 1
            return act(*arguments)

        return call

    for verb in ("create", "put", "read", "head", "page", "delete"):
        setattr(objects.kind, verb, counted(verb, getattr(objects.kind, verb)))
    before, started = _peak_rss(), time.perf_counter()
    held = state.load(objects, count, compact=True)
    seconds = time.perf_counter() - started
    if held.count("done") != count:
        raise SystemExit(f"{held.count('done'):,} of {count:,} commits were found")
    return seconds, before, _peak_rss(), calls


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
