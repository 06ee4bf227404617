"""When a run ends: its items rehearsed on the real dispatcher, and what gangs for the last of them would gain."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np

from vidgen.fleet.dispatch import Rules
from vidgen.fleet.offering import long_first, long_flops
from vidgen.fleet.rehearsal import Rehearsal, Rehearsed
from vidgen.store import ledger
from vidgen.store.objects import Objects
from vidgen.types import Item, Request

PUBLISHED = {
    "Wan 14B I2V 480p (446 s)": ([446.0], [1.0]),
    "1.3B, 14B 480p, Hunyuan 720p": ([47.8, 446.0, 945.0], [0.7, 0.25, 0.05]),
}
"""Seconds an item on one H100 or H200, as others published them (50 steps; SGLang 47.8 s, xDiT 8.93 s a step, FastVideo
945 s), and the share of the items that cost it."""
MIXED = {
    "99 % at 48 s, 1 % at an hour": ([47.8, 3600.0], [0.99, 0.01]),
    "20 shapes of 10 s to 1,000 s": ([10.0 * 100 ** (n / 19) for n in range(20)], [1.0] * 20),
}
"""Workloads harder than the published ones: (seconds an item, shares)."""


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


def gangs(arguments: argparse.Namespace) -> None:
    """What merging idle GPUs into gangs for the last items would gain over one replica a GPU: a simulation, no run."""
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
