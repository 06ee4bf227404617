"""A real Ray cluster of three nodes: it loses nodes, is told that one will go, grows and shrinks, while a run lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.fleet.gang_faults import Cards
from tests.fleet.test_gang_ray import STORE, Run, until
from vidgen.fleet import events as ev
from vidgen.fleet import nodes as machines
from vidgen.fleet.driver import Outcome
from vidgen.fleet.elastic import rooms
from vidgen.fleet.formation import Band
from vidgen.fleet.watch import Watch
from vidgen.parallel.layout import Layout
from vidgen.report.verify import verify

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
    """A run of single replicas, driven in a thread."""

    def __init__(self, folder: Path, replicas: int, rows: int, **options: float) -> None:
        self.run = Run(folder, replicas, 1, Cards(), rows=rows, **options)
        self.rows = rows
        self.outcome: list[Outcome] = []
        self.run.fleet.watch = Watch(machines.draining, machines.present)
        self._thread = threading.Thread(target=lambda: self.outcome.append(self.run.drive()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def seen(self, kind: type) -> list[ev.Event]:
        return [event for event in list(self.run.fleet.seen) if isinstance(event, kind)]

    def lost_with_nodes(self) -> int:
        """Replicas that went with their nodes, beside what Ray began on a node that it did not yet know to be gone."""
        causes = [cause for _, cause in self.run.fleet.lost()]
        assert set(causes) <= {"node", "start"}, causes
        return causes.count("node")

    def ready(self) -> list[ev.ReplicaReady]:
        return [event for event in self.seen(ev.ReplicaReady) if isinstance(event, ev.ReplicaReady)]

    def finishes(self) -> None:
        """Every item is made, and nothing counted against any."""
        self._thread.join(300)
        assert self.outcome and (self.outcome[0].code, self.outcome[0].counts["done"]) == (0, self.rows), self.outcome
        verdict = verify(str(self.run.output))
        assert verdict.ok and verdict.done == self.rows, verdict.problems
        assert not list(self.run.objects.list("attempts"))


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


def test_a_node_that_ray_is_told_will_go_is_left_before_it_goes(
    tmp_path: Path, cluster: Cluster, workers: list[object]
) -> None:
    """The notice is a real one, as a spot handler or an autoscaler gives it. What runs there would take far longer."""
    driven = Driven(tmp_path, 2 * PLACES, rows=12, step_seconds=1.5)
    driven.start()
    until(lambda: len(driven.ready()) == 2 * PLACES, 120)
    leaving = workers[0].node_id  # type: ignore[attr-defined]
    there = {event.replica for event in driven.ready() if event.node == leaving}
    assert len(there) == PLACES
    until(lambda: any(p is not None and p.stage == "denoise" for p in driven.run.fleet.pulses().values()))
    client = ray._raylet.GcsClient(address=cluster.address)
    accepted, why = client.drain_node(
        leaving,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a spot notice",
        int((time.time() + 1000) * 1000),
    )
    assert accepted, why
    until(lambda: bool(driven.seen(ev.NodeDraining)))
    sent = len(driven.ready())
    workers.append(add(cluster))
    until(lambda: len(driven.ready()) == sent + PLACES, 120)
    assert {event.node for event in driven.ready()[sent:]} == {workers[2].node_id}  # type: ignore[attr-defined]
    driven.finishes()
    assert driven.run.fleet.lost() == []


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
