"""What can go wrong, by who must act: the user (config, plan, damage), or the driver (item, capacity, replica,
infrastructure).

Refuses to know how an error is shown or counted; `vidgen.fleet.judgement` decides retries, `vidgen.cli` exit codes.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """A text of a stranger's making as a message may quote it: what a terminal would obey (escape sequences, line
    ends), and what turns or hides letters, is written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """Something the user caused. The message names the file, row or key, the wrong value and the allowed ones."""


class ConfigError(UserError):
    """The configuration cannot be run: unknown key, wrong type, missing checkpoint component. Exit code 2."""


class PlanError(UserError):
    """The dataset cannot be planned as a whole: missing file, missing column, no valid row. Exit code 2."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, of another architecture, or uses an option we do not support. Names it."""


class DamagedError(RuntimeError):
    """An output is not what its own manifest says. Names the item, and the command that mends it. Exit code 1."""


class GenerationError(RuntimeError):
    """An item did not become a video. `error_class` is the failure class of the manifest and of `attempts/`."""

    error_class = "item"


class ItemError(GenerationError):
    """The row's own fault, as far as we can tell: bad media, NaN, a black clip, a probe that disagrees. Counts."""


class CapacityError(GenerationError):
    """Not enough memory for this item as it was run. Climbs the capacity ladder; never changes pixels."""

    error_class = "capacity"


class InfrastructureError(GenerationError):
    """Storage or node trouble that says nothing about the item. Counts nothing; the item is tried again."""

    error_class = "infrastructure"


class GangError(InfrastructureError):
    """The ranks of a gang did not meet, or one of them no longer answers: the gang is of no use, and the item is tried
    again. Trouble of a store that rank 0 meets is none of these: all ranks hear of it and go on together."""


class Cancelled(Exception):
    """Generation was asked to stop between two steps."""
