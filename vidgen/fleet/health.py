"""Which nodes fail so often that they are better avoided: a rule over the outcomes of the last attempts on each.

Pure; refuses to know what is done about it, except that a node is never avoided unless another is there to take over,
which whoever asks must say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

LAST = 50
"""Attempts on a node that are looked at."""
LEAST_TROUBLES = 5
LEAST_SHARE = 0.2
TIMES = 4.0
"""A node is bad with 5 troubles or more among its last 50 attempts, if these are a fifth of them or more, and the other
nodes together had none, or made 5 attempts or more and have a share of which that is 4 times or more. (Their share is
(t + 1) / (n + 1), so that few attempts prove little.)"""
PAROLE_SECONDS = 1800.0
"""How long a node is avoided before it is tried again."""


@dataclass(slots=True)
class Node:
    """`outcomes`: True for trouble, of the last attempts. `until`: it is avoided up to then."""

    outcomes: deque[bool] = field(default_factory=lambda: deque(maxlen=LAST))
    until: float = 0.0


class Health:
    """Attempts by node. A trouble is a replica that died, or failed to start, or storage that failed; a success an item
    that was made. What a row does to itself is neither."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def success(self, node: str) -> None:
        if node:
            self._node(node).outcomes.append(False)

    def trouble(self, node: str) -> None:
        if node:
            self._node(node).outcomes.append(True)

    def release(self, now: float) -> list[str]:
        """Nodes whose time is up: they begin anew."""
        free = [name for name, node in self._nodes.items() if node.until and node.until <= now]
        for name in free:
            self._nodes[name] = Node()
        return free

    def avoided(self) -> set[str]:
        return {name for name, node in self._nodes.items() if node.until}

    def judge(self, node: str, beside: Collection[str], now: float) -> str:
        """Begins to avoid `node` if it is bad; why, or "". `beside`: the nodes that could take over, without it."""
        mine = self._node(node)
        others = [outcome for name in beside for outcome in self._node(name).outcomes if name != node]
        troubles, attempts = sum(mine.outcomes), len(mine.outcomes)
        if mine.until or not beside or troubles < LEAST_TROUBLES or troubles < LEAST_SHARE * attempts:
            return ""
        elsewhere = (sum(others) + 1) / (len(others) + 1)
        if any(others) and (len(others) < LEAST_TROUBLES or troubles < TIMES * elsewhere * attempts):
            return ""
        mine.until = now + PAROLE_SECONDS
        return (
            f"{troubles} of its last {attempts} attempts were lost replicas or failed storage, elsewhere {sum(others)} "
            f"of {len(others)}"
        )

    def _node(self, name: str) -> Node:
        return self._nodes.setdefault(name, Node())
