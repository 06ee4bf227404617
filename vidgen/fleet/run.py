"""`vidgen generate`: plan if there is no plan, become the driver, bring up replicas, drive to the end.

The one place where configuration, plan, lease, cluster and driver meet. Refuses to print results; `vidgen.cli` does.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from vidgen import family, manifest
from vidgen.config import JobConfig, loras, model_options
from vidgen.errors import ConfigError, UserError
from vidgen.fleet import cluster
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Interrupt, Limits, Outcome, finished_code, replica_names
from vidgen.fleet.opening import Run, deadline_of, prepare
from vidgen.fleet.progress import Progress
from vidgen.fleet.replica import Settings
from vidgen.plan.cost import device_problem
from vidgen.store import epochs, state
from vidgen.store.objects import Objects
from vidgen.types import ModelSettings

GPU_BATCH_TOKENS = 16_384
"""Batching pays below about this many tokens a forward."""
BATCH_ITEMS = 32
CPU_REPLICA_BYTES = 1_500_000_000
"""What a replica on CPU takes beside its weights: interpreter, torch, activations of small models."""
TERMINATE_GRACE = 1.0
"""Seconds after SIGTERM for what is in flight; `ray job stop` kills after three."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the configuration."""

    address: str | None = None
    takeover: bool = False
    quiet: bool = False


def generate(source: str, overrides: Sequence[str], options: Options) -> tuple[Run, Outcome]:
    """Runs or resumes a job until every item is terminal, or it must stop. Raises UserError (exit 2), Held (75)."""
    progress = Progress(Objects("memory://"), quiet=options.quiet)
    run = prepare(source, overrides, progress.say)
    progress.objects = run.objects
    lease = epochs.acquire(run.objects, lease=run.config.run.lease, takeover=options.takeover)
    held = state.load(run.objects, run.items, compact=True)
    try:
        if held.count("pending"):
            return run, _drive(run, held, lease, progress, options)
        return run, _finish(run, held, lease)
    except UserError:
        lease.release(**lease.inherited())
        raise
    finally:
        progress.close()


def _finish(run: Run, held: state.State, lease: epochs.Lease) -> Outcome:
    """Every item is terminal already: the manifest is written again if it does not match."""
    reason = "nothing to do: every item is terminal"
    if not manifest.is_valid(run.objects, run.plans, held):
        manifest.write(run.objects, run.plans, held, lease.token, before_write=lease.check)
        reason = "every item was terminal; the manifest was written again"
    counts = held.counts()
    lease.release(**lease.inherited(), counts=counts)
    return Outcome(finished_code(counts), reason, counts, 0.0)


def _drive(run: Run, held: state.State, lease: epochs.Lease, progress: Progress, options: Options) -> Outcome:
    pending = held.count("pending")
    progress.say(f"{pending} of {run.items} items to do, output {run.objects.url}")
    interrupt = Interrupt()
    with _signals(interrupt) as install:
        cluster.connect(options.address, progress.say)
        install()
        settings, resources = _replicas(run, pending, lease)
        threads = settings.model.threads or "all"
        progress.say(f"{resources.replicas} replicas on {settings.model.device}, {threads} threads each")
        fleet = cluster.RayFleet(settings, resources, run.config.run.hang_seconds)
        driver = Driver(run.config.name, run.objects, run.plans, held, lease, fleet, progress)
        driver.interrupt = interrupt
        try:
            return driver.run(_rules(run, settings), replica_names(resources.replicas), _limits(run.config))
        finally:
            fleet.close()
            cluster.disconnect()


def _replicas(run: Run, pending: int, lease: epochs.Lease) -> tuple[Settings, cluster.Resources]:
    config, plan = run.config, run.plans[-1]
    cpus, gpus, memory = cluster.cluster_resources()
    needs_weights = family.spec(plan.family).CHECKPOINT
    problem = device_problem(plan.estimate, config.engine.device, gpus, cpus) if needs_weights else None
    if problem:
        raise ConfigError(problem)
    device = config.engine.device if config.engine.device != "auto" else "cuda" if gpus else "cpu"
    threads = None if config.engine.threads == "auto" else int(config.engine.threads)
    wanted = None if config.parallel.replicas == "auto" else int(config.parallel.replicas)
    if device == "cuda" and needs_weights:
        if wanted is not None and wanted > gpus:
            raise ConfigError(
                f"parallel.replicas: {wanted}, but the cluster has {gpus} GPUs; at most one replica a GPU"
            )
        resources = cluster.Resources(min(wanted or gpus, pending), cpus=1, gpus=1)
    else:
        device = "cpu"
        each = CPU_REPLICA_BYTES + 2 * int(plan.estimate["weight_bytes"])
        count, threads, share = cpu_replicas(cpus, memory // each, pending, wanted, threads)
        resources = cluster.Resources(count, cpus=share, gpus=0)
    return _settings(run, lease, device, threads), resources


def cpu_replicas(cpus: int, fit: int, pending: int, wanted: int | None, threads: int | None) -> tuple[int, int, float]:
    """(replicas, threads of each, CPUs that each reserves) on `cpus` cores where `fit` replicas fit into memory.

    More threads than cores slow each other manyfold, so an unsaid number of replicas or threads is what is left."""
    count = wanted or max(1, min(cpus // (threads or 1), fit, pending))
    share = cpus / count
    reserved = float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
    return count, threads or max(1, cpus // count), reserved


def _settings(run: Run, lease: epochs.Lease, device: str, threads: int | None) -> Settings:
    config, plan, objects = run.config, run.plans[-1], run.objects
    probe, token = f"epochs/{lease.epoch}.probe", f"epoch {lease.epoch} {lease.token}"
    objects.put(probe, token.encode())
    return Settings(
        output=objects.root if objects.local else objects.url,
        single_writer=config.run.single_writer,
        probe=(probe, token),
        model=ModelSettings(
            checkpoint=plan.checkpoint,
            family=plan.family,
            task=plan.task,
            revision=plan.resolved["model"]["revision"],
            loras=loras(config),
            pipeline=config.model.pipeline,
            options=model_options(config),
            dtype=config.model.dtype,
            device=device,
            offload=config.engine.offload,
            quantization=config.engine.quantization,
            compile=str(config.engine.compile),
            attention=config.engine.attention,
            threads=threads,
            cache_dir=config.model.cache_dir,
            expected_hash=plan.checkpoint_hash or None,
        ),
        format=config.output.format,
        codec=plan.resolved["output"]["codec"],
        crf=config.output.crf,
        allow_constant=config.run.allow_constant,
    )


def _rules(run: Run, settings: Settings) -> Rules:
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
        own_node=cluster.own_node(),
    )


def _limits(config: JobConfig) -> Limits:
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
