"""Whatever a dataset or a configuration holds, it is planned, or refused with an error of ours: never another one.

Each promise is tried a few hundred times here and many thousand times under the `slow` marker.
"""

from __future__ import annotations

import io
import json
import struct
import uuid
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plan.conftest import items_of, job
from vidgen import config as configuration
from vidgen import identity
from vidgen.checkpoint import adapter
from vidgen.config_rules import COLUMN_FIELDS, leaves
from vidgen.errors import UserError
from vidgen.plan.build import build
from vidgen.store.objects import Objects

FAST, SLOW = 120, 2_500
"""Cases of each promise: two are about the reader of plans, two about the loader of configurations, 5,000 a pair."""


def tried(examples: int) -> Any:
    """Hypothesis settings for so many cases; where they come from is decided by the test's name, so a failure comes
    again."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks, database=None)


# ---------------------------------------------------------------- any cells

NASTY = (
    "",
    " ",
    "\0",
    "\u202e",
    "a\u0301",
    "\ud7ff",
    "<script>",
    "../../x",
    "/etc/passwd",
    "NaN",
    "1",
    "🦊",
    "x" * 3000,
)
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=20)).filter(lambda text: text.isascii() or _is_utf8(text))
WHOLE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 5, 64, 65, 2**31, 2**48, 2**53 + 1]))
NUMBER = st.one_of(st.floats(width=64), st.sampled_from([0.0, -0.0, 1.0, 8.0, 64.5, 1e300, 5e-324]))
MOMENT = st.integers(-(2**62), 2**62)
KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    *((kind, TEXT) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    (pa.dictionary(pa.int32(), pa.string()), TEXT),
    *((kind, st.binary(max_size=12)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    *((kind, WHOLE.filter(lambda n: abs(n) < 2**62)) for kind in (pa.int64(),)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.int8(), st.integers(-128, 127)),
    *((kind, NUMBER) for kind in (pa.float64(),)),
    (pa.float32(), st.floats(width=32)),
    (pa.float16(), st.floats(width=16)),
    (pa.bool_(), st.booleans()),
    (pa.decimal128(38, 0), st.integers(-(10**37), 10**37).map(Decimal)),
    (pa.decimal128(10, 3), st.integers(-(10**9), 10**9).map(lambda n: Decimal(n).scaleb(-3))),
    (pa.decimal256(60, 0), st.integers(-(10**59), 10**59).map(Decimal)),
    *((pa.timestamp(unit, tz), MOMENT) for unit in ("s", "ms", "us", "ns") for tz in (None, "UTC", "Mars/Phobos")),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.duration("ns"), MOMENT),
    (pa.time64("ns"), st.integers(0, 86_399_999_999_999)),
    (pa.null(), st.none()),
    (pa.uuid(), st.binary(min_size=16, max_size=16)),
    (pa.list_(pa.string()), st.lists(TEXT, max_size=2)),
    (pa.map_(pa.string(), pa.int64()), st.lists(st.tuples(TEXT, st.integers(0, 9)), max_size=2)),
    (
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        st.fixed_dictionaries({"bytes": st.none(), "path": TEXT}),
    ),
]
MAPPED = [
    *(name for name in COLUMN_FIELDS if name not in ("last_image", "video")),
    "params.step_seconds",
    "params.fail",
]
"""Request fields that a test card of task t2v or i2v may be given."""
_SIZE = st.sampled_from([16, 32, 48, 64])
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
"""One red pixel."""
FITTING: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "id"), (pa.string(), st.sampled_from(["a fox", "b", "🦊"]))),
    "image": (pa.string(), st.sampled_from([PICTURE, PICTURE, PICTURE, "nosuch.png"])),
    "seed": (pa.int64(), st.integers(0, 9)),
    "height": (pa.int64(), _SIZE),
    "width": (pa.int64(), _SIZE),
    "num_frames": (pa.int32(), st.sampled_from([1, 5, 9])),
    "fps": (pa.float64(), st.sampled_from([8.0, 24.0])),
    "num_inference_steps": (pa.int64(), st.integers(1, 4)),
    "guidance_scale": (pa.float32(), st.sampled_from([1.0, 7.5])),
    "priority": (pa.int32(), st.integers(-3, 3)),
    "params.step_seconds": (pa.float64(), st.sampled_from([0.0, 0.5])),
    "params.fail": (pa.string(), st.sampled_from(["", "item"])),
}
"""A type and cells that each takes: most of a table is of these, so that more than the first check is met."""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@st.composite
def column(draw: st.DrawFn, rows: int, name: str = "") -> pa.Array:
    """Rows of some type and value; of a field that has a name, mostly of what fits it."""
    if name in FITTING and draw(st.integers(0, 7)):
        kind, plausible = FITTING[name]
        of_kind = next((values for known, values in KINDS if known == kind and pa.types.is_string(kind)), plausible)
        values = st.one_of(plausible, plausible, plausible, of_kind, st.none())
    else:
        kind, values = draw(st.sampled_from(KINDS))
        values = st.one_of(st.none(), values)
    cells = draw(st.lists(values, min_size=rows, max_size=rows))
    if pa.types.is_string(kind) and draw(st.integers(0, 19)) == 0:
        broken = [b"\xff\xfe" if draw(st.booleans()) else b"a"]
        return pa.array(broken * rows, pa.binary()).view(pa.string())
    return pa.array(cells, kind)


@st.composite
def dataset(draw: st.DrawFn) -> tuple[pa.Table, dict[str, Any], dict[str, Any]]:
    """A table, and rooms of a configuration that is about right for it."""
    rows = draw(st.sampled_from([0, 1, 3, 5, 6, 7, 8]))
    wanted = ["prompt", *draw(st.lists(st.sampled_from(MAPPED), max_size=4, unique=True))]
    names = {name: f"c {name}" for name in wanted}
    columns = {names[name]: draw(column(rows, name)) for name in names}
    extra = draw(
        st.lists(
            st.one_of(TEXT, st.sampled_from(["status", "ordinal", "\0row", "a.b", "input_id"])), max_size=3, unique=True
        )
    )
    columns.update({name: draw(column(rows)) for name in extra if name not in columns})
    rooms: dict[str, Any] = {"columns": names, "samples_per_row": draw(st.integers(1, 2))}
    if draw(st.booleans()):
        columns["id"], rooms["id_column"] = draw(column(rows, "id")), "id"
    if draw(st.integers(0, 3)) == 0:
        of_id = ("id > 1", "id = '1'", "not id = 'b'") if "id" in columns else ()
        rooms["where"] = draw(
            st.sampled_from(['"c prompt" is not null', "\"c prompt\" like '%a%'", "not \"c prompt\" = 'b'", *of_id])
        )
    if draw(st.integers(0, 3)) == 0:
        rooms["media_schemes"] = draw(st.sampled_from([[], ["file"], ["relative"]]))
    return pa.table(columns), rooms, {"task": "i2v" if "image" in names else "t2v"}


def plan_of(source: Path, rooms: dict[str, Any], model: dict[str, Any]) -> str:
    """Plans, and holds what was planned against what was read. Returns what became of it: planned or refused."""
    objects = Objects(f"memory://fuzz/{uuid.uuid4()}")
    config = job(source, dataset={**rooms, "path": str(source)}, model={"family": "testcard", **model})
    try:
        result = build(config, objects)
    except UserError as error:
        assert str(error).strip()
        return "refused"
    counts = result.plan.counts
    assert counts["items"] + counts["rejected"] * rooms["samples_per_row"] == counts["rows"] * rooms["samples_per_row"]
    items = items_of(objects, result)
    assert len({item.item_id for item in items}) == len(items) == counts["items"]
    for item in items:
        assert item.request_hash == identity.request_hash(item.request) and item.item_id.isalnum()
    return "planned"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_any_table_is_planned_row_by_row_or_refused_with_a_reason(examples: int, tmp_path: Path) -> None:
    became: Counter[str] = Counter()

    @tried(examples)
    @given(dataset())
    def each(case: tuple[pa.Table, dict[str, Any], dict[str, Any]]) -> None:
        table, rooms, model = case
        source = tmp_path / "a.parquet"
        try:
            pq.write_table(table, source)
        except (pa.ArrowException, ValueError):
            return  # pyarrow itself does not write it
        became[plan_of(source, rooms, model)] += 1

    each()
    assert became["planned"] > examples / 4 and became["refused"] > examples / 20, became


# ---------------------------------------------------------------- any bytes


def _whole_files() -> list[bytes]:
    """Small files in several of the ways Parquet is written."""
    nested = [{"a": ["x", None], "b": {"c": 1}}, None, {"a": [], "b": None}] * 7
    table = pa.table(
        {"prompt": ["a fox", "é\0", None] * 7, "id": list(range(21)), "n": [1.5, None, 2.0] * 7, "s": nested}
    )
    ways: list[dict[str, Any]] = [
        {},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 5, "write_page_checksum": True},
        {"compression": "zstd", "store_schema": False, "write_page_index": True},
        {"compression": "none", "store_schema": False, "write_statistics": False},
    ]
    found = []
    for way in ways:
        sink = io.BytesIO()
        pq.write_table(table, sink, **way)
        found.append(sink.getvalue())
    return found


WHOLE_FILES = _whole_files()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, cut out, or written twice; half of the time in its footer."""
    data = bytearray(draw(st.sampled_from(WHOLE_FILES)))
    footer = struct.unpack("<I", data[-8:-4])[0] + 8
    for _ in range(draw(st.integers(1, 4))):
        start = len(data) - footer if draw(st.booleans()) and len(data) > footer else 0
        at = draw(st.integers(start, max(start, len(data) - 1)))
        what = draw(st.integers(0, 9))
        if what < 7 and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif what == 7:
            del data[at : at + draw(st.integers(1, 40))]
        elif what == 8:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_or_refused(examples: int, tmp_path: Path) -> None:
    became: Counter[str] = Counter()

    @tried(examples)
    @given(damaged())
    def each(data: bytes) -> None:
        source = tmp_path / "a.parquet"
        source.write_bytes(data)
        rooms = {"columns": {"prompt": "prompt"}, "id_column": "id", "samples_per_row": 1}
        became[plan_of(source, rooms, {})] += 1

    each()
    assert became["planned"] > examples / 20 and became["refused"] > examples / 2, became


# ---------------------------------------------------------------- any configuration

DEFAULTS = dict(leaves(configuration.to_dict(configuration.JobConfig())))
KEYS = [
    *DEFAULTS,
    *("dataset", "sampling", "model.loras", "sampling.params", "sweep.over", "model.options", "parallel.by_shape"),
    *("sampling.params.fail", "sweep.over.height", "sweep.over.params.fail", "dataset.columns.image", "nosuch.key", ""),
]
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    TEXT,
    st.sampled_from(
        ["auto", "${name}", "${nosuch}", "${oc.env:HOME}", "${", "???", "${.a}", "$" * 9, "null", "1e3", "*a"]
    ),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(TEXT, st.sampled_from(["path", "weight", "params", "height"]), st.integers()), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, Any]:
    """A key and a value, half of the time one of its kind."""
    key = draw(st.sampled_from(KEYS))
    known = DEFAULTS.get(key)
    of_its_kind = {
        bool: st.booleans(),
        int: st.integers(1, 64),
        float: st.floats(0.5, 64, width=16),
        str: st.sampled_from([known, "a", "/x/y", "8"]),
        list: st.just(known),
        type(None): st.sampled_from([None, 1, 2.5, "a", 48]),
    }
    return key, draw(of_its_kind[type(known)] if key in DEFAULTS and draw(st.booleans()) else VALUE)


def any_config(changes: list[tuple[str, Any]]) -> str:
    """A configuration made of anything is one, or a ConfigError; what is one survives being frozen as JSON."""
    values: dict[Any, Any] = {"model": {"family": "testcard"}, "dataset": {"path": "p"}, "output": {"path": "o"}}
    for key, value in changes:
        place, *rest = values, *key.split(".")
        for name in rest[:-1]:
            place = place.setdefault(name, {}) if isinstance(place.get(name, {}), dict) else {}
        place[rest[-1]] = value
    try:
        config = configuration.from_dict(values, "fuzz")
    except UserError as error:
        assert str(error).strip()
        return "refused"
    frozen = json.loads(json.dumps(configuration.to_dict(config)))
    assert configuration.to_dict(configuration.from_dict(frozen)) == configuration.to_dict(config)
    assert all(configuration.to_dict(config)[room] is not None for room in ("model", "run"))
    return "accepted"


def any_yaml(text: str, overrides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        configuration.load(str(path), overrides)
    except UserError as error:
        assert str(error).strip()


SMALLEST = "dataset: {path: p}\noutput: {path: o}\n"
WORDS = st.sampled_from(
    [
        *(
            "dataset",
            "output",
            "path",
            "sampling",
            "height",
            "{",
            "}",
            "[",
            "]",
            ":",
            ": ",
            ",",
            "- ",
            "\n",
            "\n  ",
            "&a ",
            "*a",
        ),
        *(
            "!!int ",
            "!!float ",
            "!!timestamp ",
            "!!binary ",
            "!!set ",
            "!!python/object:os.system ",
            "? ",
            "|",
            ">",
            "'",
            '"',
            "#",
        ),
        *(
            "${",
            "}",
            "${name}",
            "<<: ",
            "%YAML 1.1\n---\n",
            "...",
            "\t",
            "\0",
            "\ufeff",
            "9" * 5000,
            "0x",
            "1:2:3",
            "2024-13-45",
        ),
    ]
)
YAML = st.builds("".join, st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=12))
OVERRIDE = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), st.one_of(YAML, TEXT))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_any_values_are_a_configuration_or_refused(examples: int) -> None:
    became: Counter[str] = Counter()

    @tried(examples)
    @given(st.lists(changed(), min_size=1, max_size=4))
    def each(changes: list[tuple[str, Any]]) -> None:
        became[any_config(changes)] += 1

    each()
    assert became["accepted"] > examples / 10 and became["refused"] > examples / 5, became


@tried(FAST)
@given(YAML, st.booleans(), st.lists(OVERRIDE, max_size=2))
def test_any_yaml_is_a_configuration_or_refused(tmp_path: Path, text: str, on_top: bool, overrides: list[str]) -> None:
    any_yaml(f"{SMALLEST}{text}" if on_top else text, overrides, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@tried(SLOW)
@given(YAML, st.booleans(), st.lists(OVERRIDE, max_size=2))
def test_any_of_thousands_of_yaml_files_is_a_configuration_or_refused(
    tmp_path: Path, text: str, on_top: bool, overrides: list[str]
) -> None:
    any_yaml(f"{SMALLEST}{text}" if on_top else text, overrides, tmp_path)


# ---------------------------------------------------------------- any adapter

SHAPE = st.one_of(st.lists(st.integers(0, 8), max_size=3), VALUE)
TENSOR = st.one_of(
    st.fixed_dictionaries({"dtype": st.just("F32"), "shape": SHAPE, "data_offsets": st.just([0, 4])}), VALUE
)
KEY = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", *adapter.PREFIXES]),
        st.sampled_from(["blocks.0.q", "blocks_0_q", "x", ""]),
        st.sampled_from(["", *adapter.SUFFIXES]),
    ),
)
META = st.one_of(
    st.dictionaries(
        st.sampled_from(["lora_adapter_metadata", "format"]),
        st.one_of(VALUE.map(lambda value: json.dumps(value, default=str)), TEXT),
    ),
    VALUE,
)


def any_adapter(header: Any, tail: bytes, tmp_path: Path) -> None:
    """A safetensors file with any header is fused wholly, or refused."""
    place = tmp_path / "a.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header, default=str).encode()
    place.write_bytes(struct.pack("<Q", len(text)) + text + tail)
    try:
        opened = adapter.open_adapter(str(place))
        adapter.assign([opened], {"transformer": {"blocks.0.q.weight": (4, 4), "x": (), "blocks.0.q.bias": (4,)}}, None)
    except UserError as error:
        assert str(error).startswith("model.loras")


@tried(FAST)
@given(
    st.one_of(st.binary(max_size=40), st.dictionaries(KEY, TENSOR, max_size=4)),
    st.one_of(st.none(), META),
    st.binary(max_size=8),
)
def test_any_adapter_file_fits_or_is_refused(tmp_path: Path, header: Any, meta: Any, tail: bytes) -> None:
    any_adapter(
        {**header, "__metadata__": meta} if isinstance(header, dict) and meta is not None else header, tail, tmp_path
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@tried(SLOW)
@given(
    st.one_of(st.binary(max_size=40), st.dictionaries(KEY, TENSOR, max_size=4)),
    st.one_of(st.none(), META),
    st.binary(max_size=8),
)
def test_any_of_thousands_of_adapter_files_fits_or_is_refused(
    tmp_path: Path, header: Any, meta: Any, tail: bytes
) -> None:
    any_adapter(
        {**header, "__metadata__": meta} if isinstance(header, dict) and meta is not None else header, tail, tmp_path
    )
