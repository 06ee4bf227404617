"""A real Ray cluster of three nodes: it loses nodes, is told that one will go, grows and shrinks, while a run lasts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.fleet.gang_faults import Cards
from tests.fleet.inline import drive
from tests.fleet.test_determinism import digests
from tests.fleet.test_gang_ray import STORE, Run, until
from tests.fleet.test_saving import job
from tests.models.wan.tiny_checkpoint import build
from vidgen.fleet import events as ev
from vidgen.fleet import nodes as machines
from vidgen.fleet.driver import Outcome
from vidgen.fleet.elastic import rooms
from vidgen.fleet.formation import Band
from vidgen.fleet.gang import Entry
from vidgen.fleet.starts import START_FAILURES
from vidgen.fleet.watch import Watch
from vidgen.parallel.layout import Layout
from vidgen.report.verify import verify
from vidgen.types import ModelSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PLACES = 2
"""Replicas that a node has room for."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for replicas, and two nodes."""
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    )
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def workers(cluster: Cluster) -> Iterator[list[object]]:
    """Two nodes with room for two replicas each, new for each test; what is appended goes at its end too."""
    made = [add(cluster), add(cluster)]
    yield made
    for node in made:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
    until(lambda: sum(entry["Alive"] for entry in ray.nodes()) == 1)


def add(cluster: Cluster) -> object:
    return cluster.add_node(num_cpus=PLACES, num_gpus=PLACES, object_store_memory=STORE)


class Driven:
    """A run of replicas, single unless `degree` says otherwise, driven in a thread."""

    def __init__(
        self, folder: Path, replicas: int, rows: int, degree: int = 1, entry: Entry | None = None, **options: Any
    ) -> None:
        self.run = Run(folder, replicas, degree, entry or Cards(), rows=rows, **options)
        self.rows = rows
        self.outcome: list[Outcome] = []
        self.run.fleet.watch = Watch(machines.draining, machines.present)
        self._thread = threading.Thread(target=lambda: self.outcome.append(self.run.drive()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def seen(self, kind: type) -> list[ev.Event]:
        return [event for event in list(self.run.fleet.seen) if isinstance(event, kind)]

    def lost_with_nodes(self) -> int:
        """Replicas that went with their nodes, and nothing else was lost. One may go twice: Ray may begin it again on a
        node that it does not yet know to be gone."""
        lost = self.run.fleet.lost()
        assert {cause for _, cause in lost} <= {"node"}, self.run.fleet.errors()
        return len({name for name, _ in lost})

    def ready(self) -> list[ev.ReplicaReady]:
        return [event for event in self.seen(ev.ReplicaReady) if isinstance(event, ev.ReplicaReady)]

    def finishes(self) -> None:
        """Every item is made, and nothing counted against any."""
        self._thread.join(300)
        assert self.outcome and (self.outcome[0].code, self.outcome[0].counts["done"]) == (0, self.rows), self.outcome
        verdict = verify(str(self.run.output))
        assert verdict.ok and verdict.done == self.rows, verdict.problems
        assert not list(self.run.objects.list("attempts"))


def test_a_job_that_starts_where_no_gpu_is_shows_that_it_waits_and_takes_the_first_that_comes(
    tmp_path: Path, cluster: Cluster
) -> None:
    driven = Driven(tmp_path, 1, rows=4)
    driven.start()
    shown = "waiting for 1 GPU (0 of 0 free)"
    until(lambda: shown in [pulse.stage for pulse in driven.run.fleet.pulses().values() if pulse])
    node = add(cluster)
    try:
        driven.finishes()
        assert driven.run.fleet.lost() == []
    finally:
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: sum(entry["Alive"] for entry in ray.nodes()) == 1)


def test_a_node_that_is_removed_takes_its_replicas_and_the_run_goes_on_elsewhere(
    tmp_path: Path, cluster: Cluster, workers: list[object]
) -> None:
    driven = Driven(tmp_path, 2 * PLACES, rows=40, step_seconds=0.2)
    driven.start()
    until(lambda: len(driven.ready()) == 2 * PLACES and bool(driven.seen(ev.ItemDone)), 120)
    cluster.remove_node(workers[0], allow_graceful=False)
    driven.finishes()
    assert driven.lost_with_nodes() == PLACES


def test_a_run_that_loses_all_its_replicas_at_once_waits_for_room_and_goes_on(
    tmp_path: Path, cluster: Cluster, workers: list[object]
) -> None:
    driven = Driven(tmp_path, 2 * PLACES, rows=30, step_seconds=0.2)
    driven.start()
    until(lambda: len(driven.ready()) == 2 * PLACES and bool(driven.seen(ev.ItemDone)), 120)
    for node in list(workers):
        cluster.remove_node(node, allow_graceful=False)
    until(lambda: driven.lost_with_nodes() == 2 * PLACES, 120)
    assert not driven.outcome, "it waits"
    workers.append(add(cluster))
    driven.finishes()


@pytest.mark.parametrize("degree", [1, 2 * PLACES])
def test_replicas_lost_with_their_nodes_while_they_load_are_no_starts_that_failed(
    tmp_path: Path, cluster: Cluster, workers: list[object], degree: int
) -> None:
    """More of them than starts may fail, before any was ready; of a gang, the part that is on one node."""
    gate = tmp_path / "open"
    driven = Driven(tmp_path, 2 * PLACES // degree, 8, degree, Gated(gate=str(gate)), strict=False)
    driven.start()
    until(lambda: loading(driven) == 2 * PLACES, 120)
    for node in workers[:1] if degree > 1 else list(workers):
        cluster.remove_node(node, allow_graceful=False)
    replicas = 2 * PLACES // degree
    assert degree > 1 or replicas >= START_FAILURES
    until(lambda: driven.lost_with_nodes() == replicas, 120)
    assert not driven.outcome and not driven.ready()
    workers.append(add(cluster))
    gate.touch()
    driven.finishes()
    assert driven.lost_with_nodes() == replicas


@dataclass(frozen=True)
class Gated(Cards):
    """A model that loads once the file is there."""

    gate: str = ""

    def load(self, settings: ModelSettings, gang: Any) -> Any:
        while not Path(self.gate).exists():
            time.sleep(0.1)
        return super().load(settings, gang)


def loading(driven: Driven) -> int:
    """Processes that load a model."""
    handles = list(driven.run.fleet.handles.values())
    return sum(bool(one.node) for handle in handles if handle.stage == "start" for one in handle.members)


def drain(cluster: Cluster, node: str, seconds: float) -> None:
    """A real notice, as a spot handler or an autoscaler gives it."""
    client = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node, reason, "a spot notice", int((time.time() + seconds) * 1000))
    assert accepted, why


def test_a_node_that_ray_is_told_will_go_is_left_before_it_goes(
    tmp_path: Path, cluster: Cluster, workers: list[object]
) -> None:
    """What runs there would take far longer."""
    driven = Driven(tmp_path, 2 * PLACES, rows=12, step_seconds=1.5)
    driven.start()
    until(lambda: len(driven.ready()) == 2 * PLACES, 120)
    leaving = workers[0].node_id  # type: ignore[attr-defined]
    there = {event.replica for event in driven.ready() if event.node == leaving}
    assert len(there) == PLACES
    until(lambda: any(p is not None and p.stage == "denoise" for p in driven.run.fleet.pulses().values()))
    drain(cluster, leaving, 1000)
    until(lambda: bool(driven.seen(ev.NodeDraining)))
    sent = len(driven.ready())
    workers.append(add(cluster))
    until(lambda: len(driven.ready()) == sent + PLACES, 120)
    assert {event.node for event in driven.ready()[sent:]} == {workers[2].node_id}  # type: ignore[attr-defined]
    driven.finishes()
    assert driven.run.fleet.lost() == []


STEPS, STOP, BRANCHES = 30, 15, 2


@dataclass(frozen=True)
class Counted(Entry):
    """A model that writes down where each of its forwards was, and of which step; the gate is before step STOP."""

    book: str = ""
    gate: str = ""

    def load(self, settings: ModelSettings, gang: Any) -> Any:
        engine = super().load(settings, gang)
        predict = engine.backend.pipeline.predict

        def counted(x: Any, schedule: Any, i: int, *rest: Any) -> Any:
            while i == STOP and not Path(self.gate).exists():
                time.sleep(0.05)
            with open(self.book, "a") as book:
                book.write(f"{machines.own_node()} {i}\n")
            return predict(x, schedule, i, *rest)

        engine.backend.pipeline.predict = counted
        return engine


def test_what_is_half_denoised_on_a_node_that_goes_is_saved_and_another_node_makes_the_steps_that_are_left(
    tmp_path: Path, cluster: Cluster, workers: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without a notice, of a native model; every step is made once."""
    (tmp_path / "whole").mkdir()
    checkpoint, (book, gate) = build(tmp_path / "wan"), (tmp_path / name for name in ("book", "gate"))
    whole = job(tmp_path / "whole", checkpoint, rows=1, steps=STEPS)
    assert drive(whole, replicas=1)[0].code == 0
    config = job(tmp_path, checkpoint, rows=1, steps=STEPS)
    driven = Driven(tmp_path, 1, 1, entry=Counted(str(book), str(gate)), config=config)
    fleet, recall = driven.run.fleet, driven.run.fleet.recall

    def told(name: str, within: float | None = None) -> None:
        """It goes on once the notice has reached it, and is over."""
        recall(name, within)
        ray.get(fleet.handles[name].members[0].actor.where.options(concurrency_group="control").remote())
        end = time.monotonic() + (within or 0.0)
        until(lambda: time.monotonic() > end)
        gate.touch()

    monkeypatch.setattr(fleet, "recall", told)
    driven.start()
    until(lambda: book.exists() and len(book.read_text().splitlines()) == STOP * BRANCHES, 120)
    first = driven.ready()[0].node
    drain(cluster, first, 1)
    driven.finishes()
    assert fleet.lost() == []
    (saved,) = (event for event in driven.seen(ev.ItemSaved) if isinstance(event, ev.ItemSaved))
    assert STOP < saved.step < STEPS
    (second,) = {event.node for event in driven.ready()} - {first}
    made = Counter(tuple(line.split()) for line in book.read_text().splitlines())
    assert made == {(first if i < saved.step else second, str(i)): BRANCHES for i in range(STEPS)}
    assert digests(str(driven.run.output)) == digests(whole.output.path)
    assert not list(driven.run.objects.list("resume"))


def test_replicas_follow_a_cluster_that_grows_and_shrinks(
    tmp_path: Path, cluster: Cluster, workers: list[object]
) -> None:
    """Four at first, two more with a node, two less without it."""
    driven = Driven(tmp_path, 2 * PLACES, rows=150, step_seconds=0.4)
    bands = [Band("parallel", -1, Layout())]
    driven.run.fleet.watch = Watch(machines.draining, machines.present, partial(rooms, bands, None))
    driven.start()
    until(lambda: len(driven.ready()) == 2 * PLACES, 120)
    workers.append(add(cluster))
    until(lambda: len({event.replica for event in driven.ready()}) == 3 * PLACES, 120)
    assert {event.replica for event in driven.ready()} == {f"g{index}" for index in range(3 * PLACES)}
    cluster.remove_node(workers[2], allow_graceful=False)
    until(lambda: driven.lost_with_nodes() == PLACES, 120)
    until(lambda: len(driven.run.fleet.handles) == 2 * PLACES)
    assert not driven.outcome, "the run goes on, with four"
    driven.finishes()
