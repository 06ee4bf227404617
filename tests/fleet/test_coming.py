"""A job that starts on an autoscaled cluster: it counts the GPUs that may come. The edge to Ray is faked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from tests.fleet.inline import config_for, write_prompts
from vidgen import family
from vidgen.errors import ConfigError
from vidgen.fleet import nodes
from vidgen.fleet.formation import Band, Coming, Formation, Node, on_gpus
from vidgen.fleet.opening import Run
from vidgen.fleet.run import _replicas
from vidgen.parallel.layout import Layout
from vidgen.plan.build import build
from vidgen.plan.files import read_plan
from vidgen.store import epochs
from vidgen.store.objects import Objects

HEAD = Node(0, 0, "head")


def base(replicas: int | None = None, degree: int = 1) -> list[Band]:
    return [Band("parallel", -1, Layout(ulysses=degree), replicas)]


def made(formation: Formation) -> tuple[int, bool]:
    """(replicas, whether each is on one machine)."""
    (kind,) = formation.kinds
    return len(kind.names), kind.strict


@pytest.mark.parametrize(
    ("bands", "gpus", "coming", "expected"),
    [
        (base(), 0, Coming(16, 8), (1, True)),  # it asks for the first; more are asked for as work shows
        (base(), 2, Coming(16, 8), (2, True)),
        (base(7), 2, Coming(5, 1), (7, True)),  # a given number waits for all of them
        (base(7), 2, Coming(sys.maxsize, 1), (7, True)),
        (base(3), 4, Coming(4, 4), (3, True)),
        (base(degree=8), 0, Coming(64, 8), (1, True)),
        (base(2, degree=8), 0, Coming(16, 8), (2, True)),
        (base(degree=8), 0, Coming(64, 4), (1, False)),  # no machine will ever have room for it
        (base(degree=8), 4, Coming(8, 4), (1, False)),
        (base(degree=4), 4, Coming(64, 8), (1, True)),
    ],
)
def test_a_start_counts_the_gpus_that_may_come(
    bands: list[Band], gpus: int, coming: Coming, expected: tuple[int, bool]
) -> None:
    formation = on_gpus(bands, [HEAD, Node(8, gpus, "a")], 100, coming=coming)
    assert made(formation) == expected and formation.gpus == 1
    assert not [note for note in formation.notes if "idle" in note]


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        (base(7), "parallel.replicas: 7, but the cluster has 2 GPUs and may get 4 more"),
        (base(2, degree=4), "nodes hold 1 of them, those that may still come too"),
    ],
)
def test_more_than_can_ever_be_is_refused_with_both_numbers(bands: list[Band], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        on_gpus(bands, [HEAD, Node(8, 2, "a")], 100, coming=Coming(4, 4))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A planned run, as if its model had weights and took an hour an item on one core."""
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), str(tmp_path / "out"))
    objects = Objects(config.output.path)
    build(config, objects)
    plans = tuple(read_plan(objects))
    monkeypatch.setitem(plans[-1].estimate, "seconds_per_item_one_core", 3600.0)
    monkeypatch.setattr(family.spec(plans[-1].family), "CHECKPOINT", True)
    return Run(config, objects, plans)


def started(run: Run, monkeypatch: pytest.MonkeyPatch, here: Node, coming: Coming) -> tuple[str, Formation]:
    """(device, replicas) of a run on a cluster with that machine."""
    monkeypatch.setattr(nodes, "cluster_nodes", lambda: ([HEAD, here], 2**34))
    monkeypatch.setattr(nodes, "coming", lambda found: coming)
    lease = epochs.acquire(run.objects, lease=60)
    try:
        settings, replicas, _ = _replicas(run, 3, lease)
    finally:
        lease.release()
    return settings.model.device, replicas


def test_a_cluster_without_gpus_that_may_bring_some_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    device, replicas = started(run, monkeypatch, Node(1, 0, "a"), Coming(8, 8))
    assert device == "cuda" and made(replicas) == (1, True)
    run.config.parallel.replicas = 2
    device, replicas = started(run, monkeypatch, Node(1, 0, "a"), Coming(8, 8))
    assert device == "cuda" and made(replicas) == (2, True)


def test_a_cluster_that_will_have_no_gpu_is_refused_or_taken_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="60 minutes on 1 cores"):
        started(run, monkeypatch, Node(1, 0, "a"), Coming())
    device, replicas = started(run, monkeypatch, Node(8, 0, "a"), Coming())
    assert device == "cpu" and replicas.gpus == 0
    run.config.engine.device = "cpu"
    assert started(run, monkeypatch, Node(8, 0, "a"), Coming(8, 8))[0] == "cpu", "one may insist"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, Coming()),
        ([({"CPU": 8}, 8)], Coming()),
        ([({"GPU": 4}, 1)], Coming()),  # all are here
        ([({"GPU": 8}, 4), ({"GPU": 4}, 2), ({"GPU": 16}, 0)], Coming(36, 8)),
        ([({"GPU": 1}, -1)], Coming(sys.maxsize - 4, 1)),
    ],
    ids=["no-autoscaler", "no-gpus", "all-here", "groups", "no-end"],
)
def test_what_may_come_is_what_rays_cluster_config_says_less_what_is_here(
    monkeypatch: pytest.MonkeyPatch, groups: list[tuple[dict[str, int], int]] | None, expected: Coming
) -> None:
    listed = [autoscaler_pb2.NodeGroupConfig(resources=has, max_count=count) for has, count in groups or ()]
    said = None if groups is None else autoscaler_pb2.ClusterConfig(node_group_configs=listed)
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: said)
    assert nodes.coming([HEAD, Node(8, 4, "a")]) == expected
