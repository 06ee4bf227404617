"""The machines of a Ray cluster: which there are, which will go, and what an autoscaler may still bring.

Refuses to know replicas.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayActorError, RayError

from vidgen.fleet.formation import Coming, Node

AT_A_TIME = 8
"""Members that are asked of an autoscaler at once, or as many again as the cluster has room for."""


def own_node() -> str:
    """Id of the node this process runs on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def cluster_nodes() -> tuple[list[Node], int]:
    """The machines of the cluster as it is now, and their bytes of memory in all."""
    living = [entry for entry in ray.nodes() if entry["Alive"]]
    nodes = [
        Node(float(entry["Resources"].get("CPU", 0)), int(entry["Resources"].get("GPU", 0)), entry["NodeID"])
        for entry in living
    ]
    return nodes, int(sum(entry["Resources"].get("memory", 0) for entry in living))


def lives(node: str) -> bool:
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def of_actor(error: RayError) -> str:
    """Id of the node of the actor that was lost with this error, even if it never ran there; "" if it is not known.

    Ray has no public question for it; a version that answers otherwise is one that does not know.
    """
    try:
        known = ray._private.state.state.actor_table(error.actor_id) if isinstance(error, RayActorError) else {}
        return str(known["Address"]["NodeID"])
    except (RayError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        return ""


def draining() -> dict[str, float | None]:
    """Seconds until each node goes that Ray was told will: by an autoscaler, by KubeRay where a pod ends, or by
    `ray drain-node`, which a handler of spot notices calls. None where no deadline was told.

    Ray has no public question for it; a version that answers otherwise is one that drains nothing.
    """
    try:
        found: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
        return {node: ms / 1000 - time.time() if ms else None for node, ms in found.items()}
    except (RayError, AttributeError, TypeError, ValueError, RuntimeError):
        return {}


def present() -> list[Node]:
    """The machines of the cluster as it is now."""
    return cluster_nodes()[0]


def present_and_to_come() -> list[Node]:
    """The machines there are, and what a run may ask of the cluster's autoscaler beside them, as one machine more; none
    more where there is no autoscaler, or it has brought all that it may."""
    here = present()
    return [*here, *to_come(here, _autoscaled()[0])]


def coming(here: Sequence[Node]) -> Coming:
    """All the GPUs that the cluster's autoscaler may ever bring beside the machines that are `here`."""
    most, largest = _autoscaled()
    more = int(most.get("GPU", 0)) - sum(node.gpus for node in here)
    return Coming(more, largest) if more > 0 else Coming()


def _autoscaled() -> tuple[Mapping[str, float], int]:
    """(What an autoscaler may bring the cluster to, GPUs of its largest machine); nothing where there is none.

    Ray has no public question for it; a version that answers otherwise is one that brings nothing.
    """
    try:
        state = ray._private.state.state
        config, most = state.get_cluster_config(), state.get_max_resources_from_cluster_config()
        groups = config.node_group_configs if config is not None else ()
        return most or {}, max((int(group.resources.get("GPU", 0)) for group in groups if group.max_count), default=0)
    except (RayError, AttributeError, TypeError, ValueError, RuntimeError):
        return {}, 0


def to_come(here: Sequence[Node], most: Mapping[str, float]) -> list[Node]:
    """What is asked for beside the machines that are `here`, where an autoscaler may bring the cluster to `most`."""
    cpus, gpus = sum(node.cpus for node in here), sum(node.gpus for node in here)
    more_gpus = int(min(most.get("GPU", 0) - gpus, max(AT_A_TIME, gpus)))
    more_cpus = min(most.get("CPU", 0) - cpus, max(AT_A_TIME, cpus))
    return [Node(max(0.0, more_cpus), max(0, more_gpus))] if more_cpus > 0 or more_gpus > 0 else []
