"""How replicas come up on a real Ray cluster: where, what they wait for, and when they are late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.fleet.inline import config_for, settings_for
from vidgen.fleet import events as ev
from vidgen.fleet.cluster import RayFleet
from vidgen.fleet.formation import Formation, Kind
from vidgen.fleet.gang import Entry
from vidgen.parallel.layout import Layout
from vidgen.store.objects import Objects

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
STORE = 80 * 2**20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without room, and two nodes with two GPUs each."""
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=STORE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Stuck(Entry):
    """A model that never loads."""

    def load(self, settings: Any, gang: Any) -> Any:
        while True:
            time.sleep(1.0)


class Broken(Entry):
    """A node whose driver is too old."""

    def load(self, settings: Any, gang: Any) -> Any:
        raise RuntimeError("the CUDA driver is too old")


def fleet_of(folder: Path, replicas: int, entry: Entry | None = None) -> RayFleet:
    output = str(folder / "out")
    objects = Objects(output)
    objects.put("epochs/probe", b"seen")
    kind = Kind(Layout(), tuple(f"r{index}" for index in range(replicas)))
    return RayFleet(settings_for(config_for("unused", output), objects), Formation((kind,), 1, 1), None, entry)


def heard(fleet: RayFleet, enough: Callable[[list[ev.Event]], bool]) -> list[ev.Event]:
    """Everything the fleet says until it is enough."""
    seen: list[ev.Event] = []
    end = time.monotonic() + 120
    while not enough(seen):
        assert time.monotonic() < end, f"only this came: {seen}"
        seen += fleet.poll(0.5)
    return seen


def ready(seen: list[ev.Event]) -> dict[str, str]:
    return {event.replica: event.node for event in seen if isinstance(event, ev.ReplicaReady)}


def test_a_replica_is_started_again_away_from_a_node_if_another_has_room(tmp_path: Path, nodes: Cluster) -> None:
    fleet = fleet_of(tmp_path, 1)
    try:
        fleet.start("r0")
        (before,) = ready(heard(fleet, lambda seen: len(ready(seen)) == 1)).values()
        fleet.start("r0", avoid=[before])
        (after,) = ready(heard(fleet, lambda seen: len(ready(seen)) == 1)).values()
        assert after != before
        fleet.start("r0", avoid=[before, after])
        assert ready(heard(fleet, lambda seen: len(ready(seen)) == 1)), "no room elsewhere: it comes up all the same"
    finally:
        fleet.close()


def test_a_replica_without_room_is_shown_waiting_with_what_it_waits_for(tmp_path: Path, nodes: Cluster) -> None:
    fleet = fleet_of(tmp_path, 5)
    try:
        for index in range(5):
            fleet.start(f"r{index}")
        seen = heard(fleet, lambda seen: len(ready(seen)) == 4)
        fleet.start_seconds, since = 0.5, time.monotonic()
        shown = "waiting for 1 GPU (0 of 4 free)"
        seen += heard(fleet, lambda _: shown in [pulse.stage for pulse in fleet.pulses().values() if pulse])
        seen += heard(fleet, lambda _: time.monotonic() - since > 3 * fleet.start_seconds)
        assert not [event for event in seen if isinstance(event, ev.ReplicaLost)], "waiting is not being late"
    finally:
        fleet.close()


def test_a_replica_that_loads_for_too_long_is_late(tmp_path: Path, nodes: Cluster) -> None:
    fleet = fleet_of(tmp_path, 1, Stuck())
    fleet.start_seconds = 3.0
    try:
        fleet.start("r0")
        (lost,) = heard(fleet, lambda seen: len(seen) == 1)
        assert isinstance(lost, ev.ReplicaLost) and lost.cause == "late"
        assert lost.error == "it was not ready 3 s after it started"
    finally:
        fleet.close()


def test_a_replica_that_cannot_load_says_why_and_where(tmp_path: Path, nodes: Cluster) -> None:
    fleet = fleet_of(tmp_path, 1, Broken())
    try:
        fleet.start("r0")
        (lost,) = heard(fleet, lambda seen: len(seen) == 1)
        assert isinstance(lost, ev.ReplicaLost) and lost.cause == "start"
        assert "RuntimeError: the CUDA driver is too old" in lost.error
        assert lost.node in {entry["NodeID"] for entry in ray.nodes()}
    finally:
        fleet.close()


def test_the_time_to_become_ready_grows_with_the_weights(tmp_path: Path) -> None:
    small = fleet_of(tmp_path, 1)
    large = RayFleet(small.settings, small.formation, None, weight_bytes=40 * 10**9)
    assert (small.start_seconds, large.start_seconds) == (900, 900 + 4000)
