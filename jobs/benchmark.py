"""Measurements: `python jobs/benchmark.py MODE`. Prints what it measured beside what it compares with; asserts nothing.

Modes are subcommands, one function each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidgen.config import from_dict
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.offering import long_first, long_flops
from vidgen.fleet.rehearsal import Rehearsal, Rehearsed
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store import commits, ledger, state
from vidgen.store.objects import Objects
from vidgen.types import Item, Record, Request

LEDGER_RECORDS = 5_000
"""Commits of a ledger part, as a driver writes them."""
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


def tail(arguments: argparse.Namespace) -> None:
    """When a run of mixed items ends, over the least that is possible: the real dispatcher, and static equal shards."""
    print(
        f"rehearsed: {arguments.items:,} items on {arguments.replicas} replicas, one prefetched; each takes its shape's"
        f" seconds +- {arguments.jitter:.0%}, which the dispatcher does not know; per cent are of the lower bound"
    )
    print(f"{'workload':30} {'plan order':15} {'bound':>9} {'over it':>8} {'an item':>8} {'shards':>8} {'changes':>8}")
    for name, (kinds, shares) in (PUBLISHED | MIXED).items():
        for order in ("shuffled", "shortest first", "longest first"):
            draw = np.random.default_rng(0)
            costs = draw.choice(kinds, arguments.items, p=np.array(shares) / np.sum(shares))
            costs = costs if order == "shuffled" else np.sort(costs)[:: 1 if order == "shortest first" else -1]
            takes = costs * draw.normal(1.0, arguments.jitter, arguments.items).clip(0.1)
            found = _rehearsed(costs, takes, arguments.replicas)
            bound = max(takes.sum() / arguments.replicas, takes.max())
            shards = max(shard.sum() for shard in np.array_split(takes, arguments.replicas))
            print(
                f"{name:30} {order:15} {bound / 3600:7.2f} h {found.seconds / bound - 1:8.2%} "
                f"{takes.max() / bound:8.2%} {shards / bound - 1:8.1%} {found.changes / arguments.replicas:8.1f}"
            )


def _rehearsed(costs: np.ndarray, takes: np.ndarray, replicas: int) -> Rehearsed:
    """The items of a plan in its order, offered as a driver offers them. A FLOP stands for a second."""
    kinds, counts = np.unique(costs, return_counts=True)
    shapes = [{"tflops_per_item": k / 1e12, "items": n} for k, n in zip(kinds.tolist(), counts.tolist(), strict=True)]
    rules = Rules()

    def read() -> Iterator[Item]:
        return (_item(ordinal, cost) for ordinal, cost in enumerate(costs.tolist()))

    items = long_first(read, long_flops(shapes, rules.window, replicas))
    names = [f"r{number:04d}" for number in range(replicas)]
    return Rehearsal(items, names, lambda item, replica: float(takes[item.ordinal]), rules).run()


def _item(ordinal: int, cost: float) -> Item:
    request = Request("t2v", "", "", 0, 64, 64, 1, 1.0, 1, 1.0, "")
    return Item(ordinal, f"{ordinal:032x}", str(ordinal), 0, request, "", "", f"{cost:g}", 1, cost)


MIXED = {
    "99 % at 48 s, 1 % at an hour": ([47.8, 3600.0], [0.99, 0.01]),
    "20 shapes of 10 s to 1,000 s": ([10.0 * 100 ** (n / 19) for n in range(20)], [1.0] * 20),
}
"""Workloads harder than the published ones: (seconds an item, shares)."""


def gangs(arguments: argparse.Namespace) -> None:
    """What merging idle GPUs into gangs for the last items would gain over one replica a GPU: a simulation, no run."""
    from vidgen.store import ledger

    draw = np.random.default_rng(0)
    costs = {name: draw.choice(kinds, 10_000, p=shares).tolist() for name, (kinds, shares) in PUBLISHED.items()}
    if arguments.output:
        records = [r for table in ledger.read_tables(Objects(arguments.output)) for r in ledger.to_records(table)]
        made = [r.encode_s + r.denoise_s + r.decode_s for r in records if r.status == "done" and r.context == 1]
        if not made:
            raise SystemExit(f"{arguments.output}: its ledger has no item that one GPU made")
        costs = {f"{len(made):,} recorded items": made}
    print(
        f"simulated: longest first; a gang of 8 is {arguments.efficiency:.0%} efficient (of 2 and 4 in proportion); "
        f"{arguments.load:g} s to load the model anew, and again for each gang; an item goes on from its saved state"
    )
    print(f"{'costs':34} {'GPUs':>5} {'items':>7} {'one a GPU':>10} {'merged':>10} {'gain':>6} {'gangs':>6}")
    for name, known in costs.items():
        for gpus in (8, 64):
            for share in (0.6, 1.1, 3.5, 10.5, 100.5):
                chosen = draw.choice(known, max(1, int(gpus * share))) * draw.normal(
                    1.0, 0.02, max(1, int(gpus * share))
                )
                single, _ = drain(chosen.tolist(), gpus, arguments.load, arguments.efficiency, largest=1)
                merged, gangs = drain(chosen.tolist(), gpus, arguments.load, arguments.efficiency, largest=8)
                hours = f"{single / 3600:8.2f} h {merged / 3600:8.2f} h"
                print(f"{name:34} {gpus:5} {len(chosen):7,} {hours} {1 - merged / single:6.1%} {gangs:6}")


def attention(arguments: argparse.Namespace) -> None:
    """The attention kernels of this GPU: the log-sum-exp that each returns, and what a gang of one costs (nothing)."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vidgen.nn.attention import attention as ours
    from vidgen.nn.attention import attention_with_lse, plain_attention_with_lse

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("attention: needs a CUDA GPU, and torch sees none (--device cpu measures the CPU's kernels)")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    print(f"torch {torch.__version__} on {name}, {str(dtype)[6:]}, {arguments.tokens:,} tokens; errors against fp32")
    print(f"{'kernel':20} {'heads x size':>12} {'lse off by':>11} {'result off by':>14} {'ms':>9}")
    for heads, size in ((12, 128), (24, 64), (5, 40)):
        draw = torch.Generator().manual_seed(0)
        shape = (1, arguments.tokens, heads, size)
        q, k, v = (torch.randn(shape, generator=draw).to(arguments.device, dtype) for _ in range(3))
        views = [x.transpose(1, 2) for x in (q, k, v)]
        plain, plain_lse = plain_attention_with_lse(*views)
        for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            chosen = getattr(SDPBackend, kernel)
            with sdpa_kernel(chosen):
                try:
                    taken = torch._fused_sdp_choice(*views)
                except RuntimeError:  # no kernel that is allowed here takes them
                    taken = None
                if taken != chosen.value:
                    print(f"{kernel:20} {heads:5} x {size:4} does not take these")
                    continue
                out, lse = attention_with_lse(q, k, v)
                seconds = _seconds(partial(attention_with_lse, q, k, v), arguments.repeats)
            off = float((lse.transpose(1, 2) - plain_lse).abs().max())
            worst = float((out.transpose(1, 2) - plain).abs().max())
            print(f"{kernel:20} {heads:5} x {size:4} {off:11.1e} {worst:14.1e} {seconds * 1e3:9.3f}")
        act = (partial(ours, q, k, v), partial(functional.scaled_dot_product_attention, *views))
        turns = [[_seconds(one, arguments.repeats) for one in act] for _ in range(3)]
        mine, direct = (min(turn[i] for turn in turns) for i in (0, 1))
        print(
            f"{'a gang of one':20} {heads:5} x {size:4} {mine * 1e3:.3f} ms, torch's own call {direct * 1e3:.3f} ms, "
            f"ratio {mine / direct:.3f}"
        )


def _seconds(act: Callable[[], Any], repeats: int) -> float:
    """Of one call, the device's queue included; the first two are not counted."""
    import torch

    def done() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(2):
        act()
    done()
    started = time.perf_counter()
    for _ in range(repeats):
        act()
    done()
    return (time.perf_counter() - started) / repeats


PUBLISHED = {
    "Wan 14B I2V 480p (446 s)": ([446.0], [1.0]),
    "1.3B, 14B 480p, Hunyuan 720p": ([47.8, 446.0, 945.0], [0.7, 0.25, 0.05]),
}
"""Seconds an item on one H100 or H200, as others published them (50 steps; SGLang 47.8 s, xDiT 8.93 s a step, FastVideo
945 s), and the share of the items that cost it."""


def drain(costs: list[float], gpus: int, load: float, efficiency: float, largest: int) -> tuple[float, int]:
    """(Seconds until the last item is made, gangs built.) `costs` are seconds on one GPU; `largest` 1 is one replica a
    GPU. Once nothing waits, the item that would be last gets the idle GPUs, in gangs of powers of two up to `largest`,
    where that pays although each gang loads the model for `load` seconds before it goes on."""

    def speed(degree: int) -> float:
        return degree * efficiency ** (math.log2(degree) / 3)

    waiting = sorted(costs)
    running: list[tuple[float, int, float]] = []  # (when it ends, GPUs, when they have loaded)
    now, idle, gangs = load, gpus, 0
    while waiting or running:
        while waiting and idle:
            running.append((now + waiting.pop(), 1, now))
            idle -= 1
        while running:
            last = end, degree, loaded = max(running)
            left = (end - max(now, loaded)) * speed(degree)
            wider = [2**n for n in range(1, 8) if degree < 2**n <= min(largest, degree + idle)]
            sooner, wanted = min(((now + load + left / speed(size), size) for size in wider), default=(end, degree))
            if sooner >= end:
                break
            running.remove(last)
            running.append((sooner, wanted, now + load))
            idle, gangs = idle - (wanted - degree), gangs + 1
        now = min(running)[0]
        idle += sum(degree for end, degree, _ in running if end == now)
        running = [one for one in running if one[0] != now]
    return now, gangs


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

    evening = mode(tail)
    evening.add_argument("--items", type=int, default=10_000)
    evening.add_argument("--replicas", type=int, default=64)
    evening.add_argument("--jitter", type=float, default=0.05, help="standard deviation of an item's seconds")

    ending = mode(gangs)
    ending.add_argument("--output", help="a finished run, whose recorded seconds are taken; else published ones")
    ending.add_argument("--load", type=float, default=60.0, help="seconds to load the model")
    ending.add_argument("--efficiency", type=float, default=0.64, help="of a gang of 8 (engines reach 0.31 to 0.86)")

    attending = mode(attention)
    attending.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    attending.add_argument("--tokens", type=int, default=8192)
    attending.add_argument("--repeats", type=int, default=20)

    resuming = mode(resume)
    resuming.add_argument("--commits", type=int, default=200_000)
    resuming.add_argument("--loose", type=int, default=5_000, help="commits that no ledger part names")
    resuming.add_argument("--output", help="an empty place below any fsspec URL (default: a temporary folder)")

    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
