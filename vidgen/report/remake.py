"""One planned item made again on this machine's GPU or CPU, alone: what it was made of, read from the plan.

Checkpoint, adapters, request, media, sampler, codec are those of the plan, so on CPU, at batch 1 and with as many
threads, the file is the committed one byte for byte. Writes nothing into the run, and needs no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidgen import config as configuration
from vidgen import engine, family, media
from vidgen.errors import UserError
from vidgen.formats import FORMATS
from vidgen.plan import model
from vidgen.plan.files import check_resume
from vidgen.report.why import Explained


@dataclass(frozen=True, slots=True)
class Made:
    """The file that was written. `committed` is the sha256 of the video in the run, "" if it has none; `same` whether
    both are equal, None where there is nothing to compare with."""

    path: str
    sha256: str
    bytes: int
    committed: str
    same: bool | None


def make(found: Explained, out: str, *, device: str = "auto", threads: int | None = None) -> Made:
    """Makes the item into the file `out`. `threads` None: as many as made the committed one, if that is known.

    UserError for another ending than the run's format has, for a plan whose family makes other pixels here, and for
    whatever the engine refuses; GenerationError if the item fails.
    """
    plan = found.plan
    config = configuration.from_dict(plan.config, f"the frozen plan of {found.output}")
    check_resume([plan], config)
    ending = FORMATS[config.output.format].extension
    if not out.endswith(ending):
        raise UserError(f"--make {out!r} must end in {ending}, the format of this run")
    record = found.record
    threads = threads or (record.threads if record is not None else 0) or None
    if not family.spec(plan.family).CHECKPOINT:
        device = "cpu"
    loaded = engine.load_model(model.settings(config, plan, device, threads))
    codec, crf = plan.resolved["output"]["codec"], config.output.crf
    (written,) = (
        media.write(video, out, format=config.output.format, codec=codec, crf=crf)
        for video in loaded.generate([found.item.request])
    )
    committed = record.sha256 if record is not None else ""
    return Made(out, written.sha256, written.bytes, committed, written.sha256 == committed if committed else None)
