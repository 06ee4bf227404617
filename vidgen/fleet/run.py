"""`vidgen generate`: plan if there is no plan, become the driver, bring up replicas, drive to the end.

The one place where configuration, plan, lease, cluster and driver meet. Refuses to print results; `vidgen.cli` does.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

import numpy as np

from vidgen import family, faults, manifest
from vidgen.config import JobConfig, to_dict
from vidgen.errors import ConfigError, UserError
from vidgen.fleet import cluster, elastic, exporter, formation, nodes
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Interrupt, Limits, Outcome, finished_code
from vidgen.fleet.formation import Band, Formation, Node
from vidgen.fleet.formation import cpu_replicas as cpu_replicas
from vidgen.fleet.metrics import Meter
from vidgen.fleet.observer import Observer
from vidgen.fleet.opening import Run, deadline_of, prepare
from vidgen.fleet.progress import Progress
from vidgen.fleet.replica import Settings
from vidgen.fleet.watch import Watch
from vidgen.plan import model, placing, sample
from vidgen.plan.cost import device_problem
from vidgen.store import epochs, state
from vidgen.store.objects import Objects

GPU_BATCH_TOKENS = 16_384
"""Batching pays below about this many tokens a forward."""
BATCH_ITEMS = 32
WINDOW_ITEMS = 4096
"""Of the plan that are known at once, at least: enough for every replica's batches, made and waiting."""
CPU_REPLICA_BYTES = 1_500_000_000
"""What a replica on CPU takes beside its weights: interpreter, torch, activations of small models."""
MOST_SAID = 20
"""Shapes of which a person is told one by one."""
TERMINATE_GRACE = 1.0
"""Seconds after SIGTERM for what is in flight; `ray job stop` kills after three."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the configuration."""

    address: str | None = None
    takeover: bool = False
    quiet: bool = False
    json_log: bool = False
    sample: int | None = None
    """Make a stratified sample of so many items, and leave the rest pending."""


def generate(source: str, overrides: Sequence[str], options: Options) -> tuple[Run, Outcome]:
    """Runs or resumes a job until every item is terminal, or it must stop. Raises UserError (exit 2), Held (75)."""
    progress = Progress(Objects("memory://"), quiet=options.quiet, json=options.json_log)
    run = prepare(source, overrides, progress.say)
    progress.objects, progress.run = run.objects, run.config.name
    lease = epochs.acquire(run.objects, lease=run.config.run.lease, takeover=options.takeover)
    with epochs.beating(lease):
        held = state.load(run.objects, run.items, compact=True)
    try:
        only = None if options.sample is None else _sample(run, options.sample)
        if _pending(held, only):
            return run, _drive(run, held, lease, progress, options, only)
        if held.count("pending"):
            counts = held.counts()
            lease.release(**lease.inherited(), counts=counts)
            return run, Outcome(0, "nothing to do: every item of the sample is terminal", counts, 0.0)
        return run, _finish(run, held, lease)
    except UserError:
        lease.release(**lease.inherited())
        raise
    finally:
        progress.close()


def _sample(run: Run, items: int) -> np.ndarray:
    return np.array(sample.stratified(sample.shapes(run.objects, run.plans), items), np.int64)


def _pending(held: state.State, only: np.ndarray | None) -> int:
    return held.count("pending") if only is None else int(np.count_nonzero(held.status[only] == state.PENDING))


def _finish(run: Run, held: state.State, lease: epochs.Lease) -> Outcome:
    """Every item is terminal already: the manifest is written again if it does not match."""
    reason = "nothing to do: every item is terminal"
    with epochs.beating(lease):
        if not manifest.is_valid(run.objects, run.plans, held):
            manifest.write(run.objects, run.plans, held, lease.token, before_write=lease.check)
            reason = "every item was terminal; the manifest was written again"
    counts = held.counts()
    lease.release(**lease.inherited(), counts=counts)
    return Outcome(finished_code(counts), reason, counts, 0.0)


def _drive(
    run: Run,
    held: state.State,
    lease: epochs.Lease,
    progress: Progress,
    options: Options,
    only: np.ndarray | None,
) -> Outcome:
    pending = _pending(held, only)
    progress.say(f"{pending} of {run.items} items to do, output {run.objects.url}")
    interrupt = Interrupt()
    with _signals(interrupt) as install:
        with epochs.beating(lease):
            cluster.connect(options.address, progress.say)
            install()
            settings, replicas, watch = _replicas(run, pending, lease)
        for note in replicas.notes:
            progress.say(f"note: {note}")
        progress.say(f"replicas on {settings.model.device}: {replicas}; {settings.model.threads or 'all'} threads each")
        weights = int(run.plans[-1].estimate["weight_bytes"])
        fleet = cluster.RayFleet(settings, replicas, run.config.run.hang_seconds, weight_bytes=weights)
        fleet.watch = watch
        driver = Driver(run.config.name, run.objects, run.plans, held, lease, fleet, progress)
        driver.interrupt, driver.only = interrupt, only
        meter = Meter(exporter.RaySink(run.config.name, run.shown_as))
        driver.observer = Observer(progress, meter, run.config.run.price_per_gpu_hour)
        try:
            rules = _rules(run, settings, replicas)
            if only is not None:  # a bad configuration is not to burn even the sample
                enough = min(rules.breaker_failures, max(rules.max_attempts + 1, pending))
                rules = replace(rules, breaker_failures=enough)
            return driver.run(rules, replicas.names, limits_of(run.config))
        finally:
            fleet.close()
            cluster.disconnect()


def _replicas(run: Run, pending: int, lease: epochs.Lease) -> tuple[Settings, Formation, Watch]:
    config, plan = run.config, run.plans[-1]
    found, memory = nodes.cluster_nodes()
    coming = nodes.coming(found)
    cpus, gpus = int(sum(node.cpus for node in found)), sum(node.gpus for node in found) + coming.gpus
    needs_weights = family.spec(plan.family).CHECKPOINT
    problem = device_problem(plan.estimate, config.engine.device, gpus, cpus) if needs_weights else None
    if problem:
        raise ConfigError(problem)
    device = config.engine.device if config.engine.device != "auto" else "cuda" if gpus else "cpu"
    device = device if needs_weights else "cpu"
    parallel = to_dict(config)["parallel"]
    members = gpus if device == "cuda" else cpus
    placement = placing.settled(run.plans, config, members)
    parallel, heads = (parallel, 1) if placement is None else (placement.parallel, placement.heads)
    estimates = [p.estimate for p in run.plans]
    per_node = max((coming.largest, *(node.gpus for node in found))) if device == "cuda" else None
    bands = formation.bands_of(parallel, heads, estimates, per_node or None)
    threads = None if config.engine.threads == "auto" else int(config.engine.threads)
    if device == "cuda":
        replicas = formation.on_gpus(bands, found, pending, threads, coming)
    else:
        each = CPU_REPLICA_BYTES + 2 * int(plan.estimate["weight_bytes"])
        replicas = formation.on_cpus(bands, found, pending, memory // each, threads)
    if placement is not None and placement.whys:
        replicas = replace(replicas, notes=(*_chosen(placement.whys), *replicas.notes))
    return _settings(run, lease, device, replicas.threads), replicas, _watch(bands, replicas, found)


def _watch(bands: Sequence[Band], replicas: Formation, found: Sequence[Node]) -> Watch:
    """Looks for nodes that will go, and, where a number of replicas is not given, for those that come."""
    if all(band.replicas is not None for band in bands):
        return Watch(nodes.draining, nodes.present)
    share = None if replicas.gpus else formation.share_of(found, sum(replicas.degrees().values()))
    return Watch(nodes.draining, nodes.present_and_to_come, partial(elastic.rooms, bands, share))


def _chosen(whys: Mapping[str, str]) -> list[str]:
    """What `degree: auto` came to, for people."""
    said = [f"parallel.degree: auto: {label}: {why}" for label, why in list(whys.items())[:MOST_SAID]]
    return said + ([f"and so for {len(whys) - MOST_SAID} more shapes"] if len(whys) > MOST_SAID else [])


def _settings(run: Run, lease: epochs.Lease, device: str, threads: int | None) -> Settings:
    config, plan, objects = run.config, run.plans[-1], run.objects
    probe, token = f"epochs/{lease.epoch}.probe", f"epoch {lease.epoch} {lease.token}"
    with faults.around("read-back probe"):
        objects.put(probe, token.encode())
    return Settings(
        output=objects.root if objects.local else objects.url,
        single_writer=config.run.single_writer,
        probe=(probe, token),
        model=model.settings(config, plan, device, threads),
        format=config.output.format,
        codec=plan.resolved["output"]["codec"],
        crf=config.output.crf,
        allow_constant=config.run.allow_constant,
        save_after=config.run.save_after,
        save_every=config.run.save_every,
    )


def _rules(run: Run, settings: Settings, replicas: Formation) -> Rules:
    config = run.config
    tokens = config.engine.batch_tokens
    if tokens == "auto":
        exact_anyway = not family.spec(run.plans[-1].family).CHECKPOINT
        tokens = GPU_BATCH_TOKENS if settings.model.device == "cuda" or exact_anyway else 0
    return Rules(
        max_attempts=config.run.max_attempts,
        breaker_failures=config.run.breaker_failures,
        batch_tokens=int(tokens),
        batch_items=BATCH_ITEMS,
        window=max(WINDOW_ITEMS, 2 * BATCH_ITEMS * len(replicas.names)),
        own_node=nodes.own_node(),
        bands=replicas.bands,
        band_of=replicas.band_of,
        degree_of=replicas.degrees(),
        rungs=_rungs(run, settings),
        order=order_of(config),
    )


def order_of(config: JobConfig) -> str:
    """`run.order`, resolved: a run that may be stopped early takes a sample first."""
    capped = config.run.max_gpu_hours is not None or config.run.deadline is not None
    return config.run.order if config.run.order != "auto" else "stratified" if capped else "longest"


def _rungs(run: Run, settings: Settings) -> tuple[str, ...]:
    """What an engine of this run can do when an item does not fit into memory."""
    if importlib.util.find_spec(f"vidgen.models.{run.plans[-1].family}.pipeline") is None:
        return ()
    return (
        ("caches", "offload") if settings.model.device == "cuda" and settings.model.offload == "none" else ("caches",)
    )


def limits_of(config: JobConfig) -> Limits:
    """What `run.max_gpu_hours` and `run.deadline` mean for a driver that starts now."""
    hours = config.run.max_gpu_hours
    deadline = deadline_of(config.run.deadline, datetime.now().astimezone()) if config.run.deadline else None
    return Limits(gpu_seconds=hours * 3600 if hours is not None else None, deadline=deadline)


@contextmanager
def _signals(interrupt: Interrupt) -> Iterator[Callable[[], None]]:
    """SIGINT asks to stop and waits a little; a second one, or SIGTERM, hardly waits. Yields what puts the handlers in
    place again, for after `ray.init`, which installs its own."""

    def interrupted(number: int, frame: object) -> None:
        again = interrupt.asked
        interrupt.asked = True
        if number == signal.SIGTERM or again:
            interrupt.grace = TERMINATE_GRACE if number == signal.SIGTERM else 0.0

    def install() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in before:
                signal.signal(number, interrupted)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install()
    try:
        yield install
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
