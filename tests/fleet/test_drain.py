"""Nodes that will go, and clusters that grow and shrink: what the dispatcher makes of it, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.fleet.inline import InlineFleet, config_for, settings_for, write_prompts
from tests.fleet.simulation import Behaviour, Simulation, item
from tests.fleet.test_dispatch import sends, tasks
from vidgen.fleet import events as ev
from vidgen.fleet import watch as watching
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.fleet.driver import Driver, Limits
from vidgen.fleet.elastic import rooms
from vidgen.fleet.formation import Band, Node
from vidgen.fleet.nodes import to_come
from vidgen.fleet.progress import Progress
from vidgen.fleet.watch import Watch
from vidgen.parallel.layout import Layout
from vidgen.plan.build import build
from vidgen.plan.files import read_plan
from vidgen.report.verify import verify
from vidgen.store import epochs, state
from vidgen.store.objects import Objects

IDLE = 60.0


def fleet(*nodes: str, rules: Rules | None = None) -> Dispatcher:
    """Replicas r0, r1, ... on these nodes."""
    dispatcher = Dispatcher(rules or Rules(idle_seconds=IDLE), [f"r{index}" for index in range(len(nodes))])
    for index, node in enumerate(nodes):
        dispatcher.handle(ev.ReplicaReady(f"r{index}", node), 0.0)
    return dispatcher


def finished(send: ev.Send) -> list[ev.Event]:
    record = Simulation(0, Behaviour(), Rules()).record(send.works[0].item)
    return [ev.BatchGenerated(send.replica, send.batch), ev.ItemDone(send.replica, record)]


def told(dispatcher: Dispatcher, *events: ev.Event, now: float = 0.0) -> list[ev.Action]:
    return [action for event in events for action in dispatcher.handle(event, now)]


# ---------------------------------------------------------------- nodes that go


def test_a_node_that_goes_gets_nothing_new_and_what_waited_there_goes_elsewhere() -> None:
    dispatcher = fleet("n0", "n1")
    first = {send.replica: send for send in sends(told(dispatcher, ev.Offered(tasks(*range(2)), exhausted=True)))}
    more = sends(told(dispatcher, ev.Offered(tasks(2, 3, 4, 5), exhausted=True)))
    waiting = next(send for send in more if send.replica == "r1")
    actions = told(dispatcher, ev.NodeDraining("n1", 130.0), now=100.0)
    assert ev.Recall("r1", 30.0) in actions and not sends(actions)
    actions = told(dispatcher, ev.BatchReturned("r1", waiting.batch), now=101.0)
    assert not [send for send in sends(actions) if send.replica == "r1"]
    assert ev.Dismiss("r1") not in actions, "it still has what it runs"
    actions = told(dispatcher, *finished(first["r1"]), now=110.0)
    assert actions[:2] == [ev.Dismiss("r1"), ev.Replace("r1")]
    actions = told(dispatcher, *finished(first["r0"]), now=110.0)
    assert {send.replica for send in sends(actions)} == {"r0"}
    assert sends(told(dispatcher, ev.ReplicaReady("r1", "n2"), now=120.0)), "its successor is on another node"


def test_what_will_not_be_done_in_time_comes_back_counts_nothing_and_is_made_elsewhere() -> None:
    dispatcher = fleet("n0")
    (send,) = sends(told(dispatcher, ev.Offered(tasks(0), exhausted=True)))
    assert told(dispatcher, ev.NodeDraining("n0", 1.0)) == [ev.Recall("r0", 1.0)]
    actions = told(dispatcher, ev.BatchReturned("r0", send.batch, (item(0).item_id,)))
    assert actions == [ev.Dismiss("r0"), ev.Replace("r0")]
    (again,) = sends(told(dispatcher, ev.ReplicaReady("r0", "n1")))
    assert again.works[0].item == send.works[0].item
    assert not dispatcher.judge.streak


def test_of_a_batch_the_part_that_is_being_written_stays_aboard() -> None:
    dispatcher = fleet("n0", rules=Rules(batch_items=2, batch_tokens=2))
    (send,) = sends(told(dispatcher, ev.Offered(tasks(0, 1), exhausted=True)))[:1]
    whole = {work.item.item_id for work in send.works}
    assert len(whole) == 1 or len(whole) == 2
    back, *_ = sorted(whole)
    told(dispatcher, ev.NodeDraining("n0", 0.0), ev.BatchReturned("r0", send.batch, (back,)))
    assert back not in dispatcher.in_flight()
    assert set(dispatcher.in_flight()) & whole == whole - {back}


def test_a_notice_is_told_once_and_a_new_deadline_again() -> None:
    dispatcher = fleet("n0")
    told(dispatcher, ev.Offered(tasks(0), exhausted=True))
    assert told(dispatcher, ev.NodeDraining("n0", None)) == [ev.Recall("r0", None)]
    assert told(dispatcher, ev.NodeDraining("n0", None)) == []
    assert told(dispatcher, ev.NodeDraining("n0", 40.0), now=30.0) == [ev.Recall("r0", 10.0)]
    assert told(dispatcher, ev.NodeDraining("n0", 20.0), now=30.0) == [ev.Recall("r0", 0.0)], "it is past"


def test_a_replica_that_comes_up_on_a_node_that_goes_is_closed_before_it_gets_work() -> None:
    dispatcher = Dispatcher(Rules(), ["r0"])
    told(dispatcher, ev.Offered(tasks(0), exhausted=True), ev.NodeDraining("n0", None))
    assert told(dispatcher, ev.ReplicaReady("r0", "n0")) == [ev.Dismiss("r0"), ev.Replace("r0")]


def test_a_stopping_run_closes_nothing_and_starts_nothing() -> None:
    dispatcher = fleet("n0")
    (send, *_) = sends(told(dispatcher, ev.Offered(tasks(0, 1, 2), exhausted=True)))
    told(dispatcher, ev.StopAsked(130, "stopped"))
    actions = told(dispatcher, ev.NodeDraining("n0", 5.0))
    assert actions == [ev.Recall("r0", 5.0)]
    assert not [a for a in told(dispatcher, *finished(send)) if isinstance(a, (ev.Replace, ev.Dismiss))]


def test_a_node_that_stays_after_all_is_used_again_and_what_was_told_to_leave_leaves() -> None:
    """Such a replica takes nothing any more: it would come back at once."""
    dispatcher = fleet("n0", "n1")
    sent = sends(told(dispatcher, ev.Offered(tasks(*range(9)), exhausted=True)))
    running, waiting = (send for send in sent if send.replica == "r1")
    told(dispatcher, ev.NodeDraining("n1", 30.0))
    actions = told(dispatcher, ev.NodeStays("n1"), ev.BatchReturned("r1", waiting.batch), ev.Tick())
    assert not {a.replica for a in actions if isinstance(a, (ev.Send, ev.Dismiss, ev.Replace))} & {"r1"}
    actions = told(dispatcher, *finished(running), now=5.0)
    assert actions[:2] == [ev.Dismiss("r1"), ev.Replace("r1")]
    actions = told(dispatcher, ev.ReplicaReady("r1", "n1"), now=9.0)
    assert {send.replica for send in sends(actions)} == {"r1"}
    assert ev.Recall("r1", 21.0) in told(dispatcher, ev.NodeDraining("n1", 30.0), now=9.0), "it is told to go again"


def test_a_replica_that_comes_up_on_a_node_that_stays_after_all_gets_work() -> None:
    dispatcher = Dispatcher(Rules(), ["r0"])
    told(dispatcher, ev.Offered(tasks(0), exhausted=True), ev.NodeDraining("n0", None), ev.NodeStays("n0"))
    assert sends(told(dispatcher, ev.ReplicaReady("r0", "n0")))


# ---------------------------------------------------------------- as many replicas as the cluster has room for


def test_a_given_number_stays_given() -> None:
    dispatcher = fleet("n0", "n1")
    told(dispatcher, ev.Offered(tasks(0), exhausted=True))
    assert told(dispatcher, ev.Room((None,)), now=1.0) == []
    assert told(dispatcher, ev.Tick(), now=10 * IDLE) == [], "idle ones stay too"
    assert ev.Replace("r1") in told(dispatcher, ev.ReplicaLost("r1", "node", "gone"), now=11 * IDLE)


def test_new_room_is_filled_as_far_as_there_is_work() -> None:
    dispatcher = fleet("n0")
    told(dispatcher, ev.Offered(tasks(*range(9)), exhausted=True))
    assert told(dispatcher, ev.Room((3,))) == [ev.Enlist("r1", 0), ev.Enlist("r2", 0)]
    assert told(dispatcher, ev.Room((3,))) == []
    actions = told(dispatcher, ev.ReplicaReady("r1", "n1"), ev.ReplicaReady("r2", "n1"))
    assert {send.replica for send in sends(actions)} == {"r1", "r2"}
    left = dispatcher.order.pending()
    assert len(told(dispatcher, ev.Room((50,)))) == left, "one replica an item is the most that can be of use"


def test_a_name_that_is_free_again_is_used_again_and_keeps_its_band_and_degree() -> None:
    rules = Rules(bands=(10,), band_of={"r0": 0, "g0": 1}, degree_of={"g0": 4}, idle_seconds=IDLE)
    dispatcher = Dispatcher(rules, ["g0", "r0"])
    for name in ("g0", "r0"):
        dispatcher.handle(ev.ReplicaReady(name, "n0"), 0.0)
    told(dispatcher, ev.Offered((), exhausted=True, band=1), ev.Offered(tasks(*range(9)), exhausted=True))
    assert told(dispatcher, ev.Room((2, 1))) == [ev.Enlist("r1", 0)]
    told(dispatcher, ev.ReplicaLost("r1", "node", "gone"), ev.Room((1, 1)))
    assert told(dispatcher, ev.Room((2, 1)))[-1:] in ([], [ev.Enlist("r1", 0)])
    assert dispatcher.rules.band_of["r1"] == 0 and dispatcher.rules.degree_of == {"g0": 4, "r1": 1}


def test_what_went_with_its_node_is_not_started_again_where_there_is_no_room_for_it() -> None:
    dispatcher = fleet("n0", "n1", "n2")
    told(dispatcher, ev.Offered(tasks(*range(30)), exhausted=True), ev.Room((3,)))
    told(dispatcher, ev.Room((1,)))
    assert ev.Replace("r1") not in told(dispatcher, ev.ReplicaLost("r1", "node", "gone"))
    assert ev.Replace("r2") not in told(dispatcher, ev.ReplicaLost("r2", "node", "gone"))
    assert ev.Replace("r0") in told(dispatcher, ev.ReplicaLost("r0", "crash", "one always is")), "the work is not done"


def test_a_replica_that_waits_for_a_place_which_is_gone_is_withdrawn() -> None:
    dispatcher = fleet("n0")
    told(dispatcher, ev.Offered(tasks(*range(30)), exhausted=True), ev.Room((3,)))
    assert told(dispatcher, ev.Room((1,))) == [ev.Dismiss("r2"), ev.Dismiss("r1")]


def test_idle_replicas_are_closed_once_the_queue_has_been_shorter_for_a_while() -> None:
    dispatcher = fleet("n0", "n1", "n2")
    (send,) = sends(told(dispatcher, ev.Offered(tasks(0), exhausted=True), ev.Room((3,))))
    assert told(dispatcher, ev.Tick(), now=IDLE - 1) == []
    actions = told(dispatcher, ev.Tick(), now=IDLE + 1)
    assert {a.replica for a in actions if isinstance(a, ev.Dismiss)} == {"r0", "r1", "r2"} - {send.replica}
    assert told(dispatcher, ev.Tick(), now=5 * IDLE) == [], "the one with work stays, and the others stay closed"
    told(dispatcher, *finished(send), now=6 * IDLE)
    assert dispatcher.finished == ev.Finish(None, "every item is terminal")


def test_nothing_is_closed_while_more_of_the_plan_is_to_come() -> None:
    dispatcher = fleet("n0", "n1")
    told(dispatcher, ev.Offered((), exhausted=False), ev.Room((2,)))
    assert not [a for a in told(dispatcher, ev.Tick(), now=9 * IDLE) if isinstance(a, ev.Dismiss)]


def test_an_item_that_waits_for_its_second_try_finds_a_replica() -> None:
    dispatcher = fleet("n0", "n1")
    (send,) = sends(told(dispatcher, ev.Offered(tasks(0), exhausted=True), ev.Room((2,))))
    failed = ev.ItemFailed(send.replica, item(0).item_id, "infrastructure", "503", "503")
    told(dispatcher, failed, ev.BatchGenerated(send.replica, send.batch), now=1.0)
    assert sends(told(dispatcher, ev.Tick(), now=10 * IDLE))


# ---------------------------------------------------------------- whom the cluster is asked


class Cluster:
    """A cluster as it is told: its nodes, and the seconds until some of them go."""

    def __init__(self, *nodes: Node) -> None:
        self.here, self.going = list(nodes), {}  # type: ignore[var-annotated]

    def nodes(self) -> Sequence[Node]:
        return self.here

    def draining(self) -> Mapping[str, float | None]:
        return dict(self.going)


def one_a_gpu(nodes: Sequence[Node]) -> tuple[int | None, ...]:
    return (sum(node.gpus for node in nodes),)


def test_a_watch_tells_what_changed_and_a_node_that_goes_is_no_room() -> None:
    cluster = Cluster(Node(8, 2, "a"), Node(8, 2, "b"))
    watch = Watch(cluster.draining, cluster.nodes, one_a_gpu)
    assert watch.look(0.0) == [ev.Room((4,))]
    cluster.here.append(Node(8, 4, "c"))
    assert watch.look(1.0) == [], "that was a moment ago"
    assert watch.look(3.0) == [ev.Room((8,))]
    assert watch.look(6.0) == []
    cluster.going = {"b": 30.0}
    assert watch.look(10.0) == [ev.Room((6,)), ev.NodeDraining("b", 40.0)]
    cluster.going = {"b": 26.7}
    assert watch.look(13.0) == [], "the same deadline, told three seconds later"
    cluster.going = {"b": 5.0}
    assert watch.look(16.0) == [ev.NodeDraining("b", 21.0)]


def test_a_watch_tells_of_a_node_that_stays_after_all_once_and_not_of_one_that_went() -> None:
    cluster = Cluster(Node(8, 2, "a"), Node(8, 2, "b"), Node(8, 2, "c"))
    watch = Watch(cluster.draining, cluster.nodes, one_a_gpu)
    cluster.going = {"b": 30.0, "c": 30.0}
    assert watch.look(0.0) == [ev.Room((2,)), ev.NodeDraining("b", 30.0), ev.NodeDraining("c", 30.0)]
    cluster.going, cluster.here = {}, cluster.here[:2]
    assert watch.look(3.0) == [ev.Room((4,)), ev.NodeStays("b")]
    assert watch.look(6.0) == []
    cluster.going = {"b": 24.0}
    assert watch.look(9.0) == [ev.Room((2,)), ev.NodeDraining("b", 33.0)]


def test_a_watch_over_a_given_number_tells_of_nodes_that_go_alone() -> None:
    cluster = Cluster(Node(8, 2, "a"))
    cluster.going = {"a": None}
    assert Watch(cluster.draining, cluster.nodes).look(0.0) == [ev.NodeDraining("a", None)]


@pytest.mark.parametrize(
    ("replicas", "share", "expected"),
    [((None, None), None, (5, 2)), ((3, None), None, (None, 3)), ((None, 1), 2.0, (4, None))],
)
def test_room_is_counted_band_by_band_and_a_given_number_is_none(
    replicas: tuple[int | None, int | None], share: float | None, expected: tuple[int | None, ...]
) -> None:
    """GPUs, or CPUs at a share each; gangs of two first, and what is left for single ones."""
    bands = [
        Band("parallel", -1, Layout(), replicas[0], flops=1.0, items=100),
        Band("parallel.by_shape[0]", 10, Layout(ulysses=2), replicas[1], flops=1.0, items=100),
    ]
    assert rooms(bands, share, [Node(8, 5, "a"), Node(4, 4, "b")]) == expected


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        ({}, []),
        ({"CPU": 16, "GPU": 4}, []),
        ({"CPU": 16, "GPU": 6}, [Node(0, 2)]),
        ({"CPU": 10_000, "GPU": 1000}, [Node(16, 8)]),
    ],
    ids=["none", "all-here", "two-more", "no-end"],
)
def test_what_an_autoscaler_may_bring_is_asked_for_in_portions(most: dict[str, float], expected: list[Node]) -> None:
    assert to_come([Node(16, 4, "a")], most) == expected


# ---------------------------------------------------------------- a driver's whole path


class Leased(InlineFleet):
    """Workers in threads, on a cluster that is told; a node goes once `after` items were sent."""

    def __init__(self, *arguments: object, cluster: Cluster, after: int) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.cluster, self.after = cluster, after
        self.watch = Watch(cluster.draining, cluster.nodes, one_a_gpu)
        self.names: list[str] = []
        self.closed: list[str] = []

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        self.names.append(name)
        super().start(name, avoid)

    def dismiss(self, name: str) -> None:
        self.closed.append(name)
        super().dismiss(name)

    def poll(self, timeout: float) -> list[ev.Event]:
        if len(self.sent) >= self.after:
            self.cluster.here = [Node(1, 1, "node1"), Node(1, 1, "node2")]
            self.cluster.going = {"node0": 0.0}
        return [*self.watch.look(watching.SECONDS * len(self.sent)), *super().poll(timeout)]


def test_a_run_whose_node_goes_and_whose_cluster_grows_makes_every_item_once(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", 24), output, sampling__params__step_seconds=0.05)
    objects = Objects(output)
    build(config, objects)
    plans = read_plan(objects)
    objects.put("epochs/probe", b"seen")
    cluster = Cluster(Node(1, 1, "node0"))
    fleet = Leased(settings_for(config, objects), 3, cluster=cluster, after=6)
    lease = epochs.acquire(objects, lease=60)
    driver = Driver("test", objects, plans, state.load(objects, 24), lease, fleet, Progress(objects, quiet=True))
    outcome = driver.run(Rules(), ["r0"], Limits())
    assert (outcome.code, outcome.counts["done"]) == (0, 24)
    assert "r0" in fleet.closed and "r1" in fleet.names
    assert not list(objects.list("attempts"))
    assert verify(output, strict=True).ok
