"""What a frozen plan holds fast: which keys of a configuration may change on resume and which may not.

Refuses to know how the plan is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidgen.config_rules import leaves, show

INEXACT_ATTENTION = ("sage",)
"""Attention kernels that change pixels beyond rounding; naming one is frozen with the plan."""

FROZEN = ("model", "dataset", "sampling", "sweep", "output", "engine.quantization", "engine.vae_tiling")
FREE = ("model.cache_dir", "dataset.max_rejected")
EXTENDABLE = ("dataset.path", "dataset.where", "dataset.limit", "dataset.samples_per_row")
NULL_KEEPS = ("model", "sampling", "output.codec")
"""Where null means `what the plan resolved`; elsewhere null is a value like any other."""


def frozen_differences(
    frozen: Mapping[str, Any], now: Mapping[str, Any], extend: bool = False, resolved: Mapping[str, Any] | None = None
) -> list[str]:
    """Each frozen key whose value changed, as `key: the plan has X, now Y`; [] if the run may go on.

    Compared as written. A null of `now` under model or sampling keeps what the plan has. `resolved` is the plan's
    account of its nulls: writing out the very value a null stood for is no difference. `extend` lets
    dataset.path, where, limit and samples_per_row differ.
    """
    before, after = dict(leaves(frozen)), dict(leaves(now))
    stood_for = dict(leaves(resolved or {}))
    found = []
    for key in sorted(before.keys() | after.keys()):
        if not _is_frozen(key, before, after) or (extend and key in EXTENDABLE):
            continue
        was, is_ = before.get(key), after.get(key)
        if was == is_ or (is_ is None and _below(key, NULL_KEEPS)):
            continue
        if was is None and _below(key, NULL_KEEPS) and key in stood_for and stood_for[key] == is_:
            continue
        found.append(f"{key}: the plan has {show(was)}, now {show(is_)}")
    return found


def _is_frozen(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if key in FREE:
        return False
    if key == "engine.attention":
        return before.get(key) in INEXACT_ATTENTION or after.get(key) in INEXACT_ATTENTION
    return _below(key, FROZEN)


def _below(key: str, rooms: Sequence[str]) -> bool:
    return any(key == room or key.startswith(f"{room}.") for room in rooms)
