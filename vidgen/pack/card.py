"""The dataset card, README.md of a pack: counts, models and licences, statistics of columns, how to open it.

Its front matter is what the Hugging Face Hub and the datasets library read. Refuses to know anything but the survey.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from vidgen import VERSION
from vidgen.errors import printable
from vidgen.pack.licence import NOT_STATED
from vidgen.pack.options import Options
from vidgen.pack.shards import NOT_SELECTED
from vidgen.pack.survey import MODEL, MOST_DISTINCT, Column, Survey
from vidgen.report.wording import duration, size

LONGEST = 60
"""Characters of one value in a table."""
FILES = {
    "webdataset": "data/{split}-*.tar",
    "parquet": "data/{split}-*.parquet",
    "hf": "data/{split}/**",
}
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video", "v2v": "video-to-video"}
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def card(title: str, survey: Survey, options: Options, licences: Mapping[str, str]) -> str:
    """The card's text. `licences` are by checkpoint hash."""
    splits = [(name, split) for name, split in survey.splits.items() if split.rows]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        resources.files("vidgen.pack").joinpath("card.md.jinja").read_text()
    )
    left = [(why, count) for why, count in sorted(survey.left_out.items()) if count]
    body = template.render(
        title=_text(title),
        survey=survey,
        seconds=sum(split.seconds for _, split in splits),
        bytes=sum(split.bytes for _, split in splits),
        format=options.format,
        version=VERSION,
        splits=splits,
        where=(options.where or "").replace("`", "'").replace("\n", " "),
        left_out=", ".join(f"{count:,} {'by the condition' if why == NOT_SELECTED else why}" for why, count in left),
        is_split=options.is_split,
        snippet=_snippet(options, splits[0][0], next(iter(survey.extensions)).removeprefix(".")),
        models=[_model(key, count, licences) for key, count in sorted(survey.models.items())],
        columns=[_column(name, column) for name, column in survey.columns.items()],
        size=size,
        duration=duration,
    )
    return f"---\n{_front_matter(title, survey, options, [name for name, _ in splits])}\n---\n\n{body}"


def _front_matter(title: str, survey: Survey, options: Options, splits: list[str]) -> str:
    from huggingface_hub import DatasetCardData

    given: dict[str, Any] = {
        "pretty_name": _text(title),
        "task_categories": sorted({TASKS[key[1]] for key in survey.models if key[1] in TASKS}) or None,
        "size_categories": [_category(survey.rows)],
        "tags": ["video", "synthetic", "vidgen"],
    }
    if options.format in FILES:
        files = [{"split": name, "path": FILES[options.format].format(split=name)} for name in splits]
        if options.format == "webdataset" and (features := _features(survey)):
            given["dataset_info"] = {"features": features}
        given["configs"] = [{"config_name": "default", "data_files": files}]
    return DatasetCardData(**given).to_yaml(line_break="\n").strip()


def _features(survey: Survey) -> list[dict[str, Any]] | None:
    """The types of a tar's members: a reader that guesses them from the first rows takes a column that begins with
    nulls for one that holds nothing. None where there are nested columns, or videos of several kinds."""
    extension = next(iter(survey.extensions)).removeprefix(".")
    if None in survey.features.values() or len(survey.extensions) > 1 or extension not in ("mp4", "webm"):
        return None
    columns = [{"name": name, "dtype": dtype} for name, dtype in survey.features.items()]
    return [
        {"name": extension, "dtype": "video"},
        {"name": "txt", "dtype": "string"},
        {"name": "json", "struct": columns},
    ]


def _category(rows: int) -> str:
    """The Hub's own names of sizes."""
    if rows < 1000:
        return "n<1K"
    place = min(len(str(rows)) - 4, len(_SIZES) - 2)
    return f"{_SIZES[place]}<n<{_SIZES[place + 1]}"


def _snippet(options: Options, split: str, extension: str) -> str:
    if options.format == "webdataset":
        return (
            "import glob, json, webdataset\n\n"
            f'shards = sorted(glob.glob("data/{split}-*.tar"))\n'
            "for sample in webdataset.WebDataset(shards, shardshuffle=False):\n"
            f'    video, prompt, row = sample["{extension}"], sample["txt"].decode(), json.loads(sample["json"])'
        )
    if options.format == "folder":
        return (
            "import pyarrow.dataset\n\n"
            'rows = pyarrow.dataset.dataset("index", format="parquet", exclude_invalid_files=True).to_table()\n'
            'rows.select(["file_name", "prompt"])'
        )
    return f'import datasets\n\nvideos = datasets.load_dataset(".", split="{split}")  # in this folder'


def _model(key: tuple[str, ...], videos: int, licences: Mapping[str, str]) -> dict[str, Any]:
    values = dict(zip(MODEL, key, strict=True))
    loras = ", ".join(f"{lora['path']} ({lora.get('weight', 1.0):g})" for lora in _loras(values["loras"]))
    digest = values["checkpoint_hash"]
    return {
        "family": _text(values["family"]),
        "task": _text(values["task"]),
        "checkpoint": _text(values["checkpoint"] or "none"),
        "hash": f"`{digest}`" if digest else "none",
        "loras": _text(loras or "none"),
        "licence": _text(licences.get(digest, NOT_STATED)),
        "videos": videos,
    }


def _loras(text: str) -> list[dict[str, Any]]:
    found = json.loads(text) if text.startswith("[") else []
    return [lora for lora in found if isinstance(lora, dict)]


def _column(name: str, column: Column) -> dict[str, str]:
    shown = column.as_json()
    many = f"over {MOST_DISTINCT:,}" if not column.type.startswith(("struct", "list", "map")) else ""
    ordered = not column.type.endswith("string")  # the first and last of many texts say little
    return {
        "name": _text(name),
        "type": _text(column.type),
        "nulls": f"{shown['nulls']:,}",
        "distinct": many if shown["distinct"] is None else f"{shown['distinct']:,}",
        "least": _text(_value(shown["min"])) if ordered or shown["distinct"] == 1 else "",
        "most": _text(_value(shown["max"])) if ordered or shown["distinct"] == 1 else "",
    }


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(value: str) -> str:
    """A stranger's text in one cell of a Markdown table: no markup, no line ends, not too long."""
    short = value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"
    escaped = html.escape(printable(" ".join(short.split())), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)
