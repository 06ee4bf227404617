"""What a checkpoint's own model card says of its licence. Never guesses one from a name."""

from __future__ import annotations

from dataclasses import dataclass

from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError, InfrastructureError

NOT_STATED = "not stated"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as a plan names it; `name` "" for a model without weights, `commit` None but on the hub."""

    name: str
    commit: str | None
    hash: str


def licence(checkpoint: Checkpoint) -> str:
    """The `license` of the metadata of the model card in the checkpoint's folder (with `license_name` where that is
    "other"); `NOT_STATED` where the folder cannot be reached, is another one by now, has no card, or its card does not
    say."""
    import yaml
    from huggingface_hub import ModelCard

    if not checkpoint.name:
        return NOT_STATED
    try:
        folder = open_checkpoint(checkpoint.name, checkpoint.commit)
        if CARD not in folder.sizes or folder.hash() != checkpoint.hash:
            return NOT_STATED
        text = folder.read(CARD).decode("utf-8", "replace")
        if not text.startswith("---"):  # no metadata, of which the library would complain
            return NOT_STATED
        card = ModelCard(text, ignore_metadata_errors=True)
    except (CheckpointError, InfrastructureError, OSError, ValueError, yaml.YAMLError):
        return NOT_STATED
    said = card.data.get("license")
    if isinstance(said, list):
        return ", ".join(map(str, said)) or NOT_STATED
    named = card.data.get("license_name")
    return f"{said} ({named})" if said and named else str(said or NOT_STATED)
