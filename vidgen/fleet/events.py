"""What happens to a fleet, and what the dispatcher wants done: plain values, so that a history can be written down."""

from __future__ import annotations

from dataclasses import dataclass, field

from vidgen.types import Item, Record

# ---------------------------------------------------------------- work

Machine = tuple[str, str]
"""The cluster's id of a node, which a new cluster gives anew, and the host's name, by which people know it."""


@dataclass(slots=True)
class Task:
    """An item on its way to a terminal state. `count` is what its failed attempts weigh, `attempt` how often it was
    started, `suspect` that it was in flight when a driver died, `alone` that it must not share a batch, `killed_on`
    the machines on which it killed a replica: nodes of this cluster, and hosts of which an earlier driver said so.
    `place` is where the run's order has it; items of one place are told apart by their length. `rungs` are those of
    the memory ladder it has climbed, `band` whose replicas it goes to where that is not the band of its size."""

    item: Item
    generation: int = 0
    count: float = 0.0
    attempt: int = 0
    suspect: bool = False
    alone: bool = False
    killed_on: set[str] = field(default_factory=set)
    place: int = 0
    rungs: tuple[str, ...] = ()
    band: int | None = None

    @property
    def item_id(self) -> str:
        return self.item.item_id

    def killed(self, machine: Machine) -> bool:
        """Whether it killed a replica there."""
        return not self.killed_on.isdisjoint(machine)

    def blame(self, machine: Machine) -> None:
        """It killed a replica there; a machine that is known by its host already is one machine."""
        node, host = machine
        self.killed_on = (self.killed_on - {host}) | {node}


@dataclass(frozen=True, slots=True)
class Work:
    """One item as a replica gets it. `saved`: a state to go on from lies in the store, as far as the driver knows.
    `rungs`: how sparing with memory its engine is to be."""

    item: Item
    generation: int
    attempt: int
    saved: bool = False
    rungs: tuple[str, ...] = ()


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Offered:
    """More of the plan, in its order, of one band of item sizes. `exhausted`: there is no more of it."""

    tasks: tuple[Task, ...]
    exhausted: bool
    band: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """`node` is the cluster's id of its machine, `host` the name that people know it by."""

    replica: str
    node: str
    host: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """`cause` is crash, hang, node (its machine went away), gang (its members fell out of step, and none of them
    died), start (it failed before it was ready), late (it was not ready within its budget) or refused (it may not run:
    another checkpoint, an output it cannot see). `node`: where it was to start, if that is known."""

    replica: str
    cause: str
    error: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class BatchGenerated:
    """All frames of the batch are made; what remains is writing, beside the next batch."""

    replica: str
    batch: int


@dataclass(frozen=True, slots=True)
class BatchReturned:
    """The replica gave a batch back unstarted; or, where `items` names them, these of its items unfinished."""

    replica: str
    batch: int
    items: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ItemSaved:
    """The state of an item after `step` denoising steps is in the store."""

    replica: str
    item_id: str
    step: int


@dataclass(frozen=True, slots=True)
class Noted:
    """Something a person may want to read, and nobody must act upon."""

    replica: str
    text: str


@dataclass(frozen=True, slots=True)
class ItemDone:
    """The item's commit is in the store, by this replica or by whoever was first."""

    replica: str
    record: Record


@dataclass(frozen=True, slots=True)
class ItemFailed:
    """`error_class` is item, capacity or infrastructure; `signature` groups equal failures."""

    replica: str
    item_id: str
    error_class: str
    error: str
    signature: str


@dataclass(frozen=True, slots=True)
class Looked:
    """Answer to Look: the item's commit, or None."""

    item_id: str
    record: Record | None


@dataclass(frozen=True, slots=True)
class NodeDraining:
    """A node will go, by `deadline` on the dispatcher's clock; None where it is not said when."""

    node: str
    deadline: float | None


@dataclass(frozen=True, slots=True)
class NodeStays:
    """A node that was to go will stay after all."""

    node: str


@dataclass(frozen=True, slots=True)
class Room:
    """How many replicas of each band the cluster has room for; None where their number is given."""

    replicas: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class StopAsked:
    """No new batches. `code` is the exit code when what is in flight has ended."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Offered
    | ReplicaReady
    | ReplicaLost
    | BatchGenerated
    | BatchReturned
    | ItemSaved
    | Noted
    | ItemDone
    | ItemFailed
    | Looked
    | NodeDraining
    | NodeStays
    | Room
    | StopAsked
    | Tick
)

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Send:
    replica: str
    batch: int
    works: tuple[Work, ...]


@dataclass(frozen=True, slots=True)
class Recall:
    """Ask a replica to give back what it has not started. What it runs it finishes, unless that can be saved, which
    loses nothing; or, with `within`, unless it will not be done in so many seconds."""

    replica: str
    within: float | None = None


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Ask a replica for what it has not started; what it runs it finishes, and takes more after it."""

    replica: str


@dataclass(frozen=True, slots=True)
class Replace:
    """Start a new replica in the place of one that was lost, or that is to leave its node. `avoid`: nodes to stay away
    from if there is room elsewhere."""

    replica: str
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Enlist:
    """Start one replica more, for a band. `avoid`: as of Replace."""

    replica: str
    band: int
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Close a replica that has nothing to do."""

    replica: str


@dataclass(frozen=True, slots=True)
class Look:
    """Read the item's commit: a replica that died may have finished it."""

    item_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Record a failed attempt, durable; `count` 0 while it is withheld, and where it counts nothing. `rungs` are those
    of the memory ladder it stood on, `next` the one it climbs to."""

    item_id: str
    generation: int
    error_class: str
    count: float
    error: str
    node: str
    rungs: tuple[str, ...] = ()
    next: str = ""


@dataclass(frozen=True, slots=True)
class Settle:
    """Commit an item as failed or quarantined."""

    task: Task
    status: str
    error_class: str
    error: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class Refill:
    """The window has room for this many items of a band."""

    items: int
    band: int = 0


@dataclass(frozen=True, slots=True)
class Say:
    """Tell whoever watches. What has a `key` holds for a while, and `vidgen status` shows it: until another text of
    that key takes its place, or none (an empty one)."""

    text: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do, or nothing may be done. `code` None: the items' states decide (0 or 3)."""

    code: int | None
    reason: str


Action = Send | Recall | Reclaim | Replace | Enlist | Dismiss | Look | Evidence | Settle | Refill | Say | Finish
