"""Configurations of a stranger's making: no value runs anything, none makes the reading endless."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vidgen.config import load
from vidgen.errors import ConfigError

SMALLEST = "dataset: {path: p}\noutput: {path: o}\n"


def refused(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(str(path), overrides)
    assert str(caught.value)
    return str(caught.value)


def test_aliases_of_aliases_are_refused_before_they_are_written_out(tmp_path: Path) -> None:
    """Ten lines that mean ten thousand million values."""
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    start = time.monotonic()
    told = refused(tmp_path, "\n".join(lines))
    assert told == f"{tmp_path}/job.yaml: its aliases make more than 10,000 values of it"
    assert time.monotonic() - start < 60  # written out they would take days


@pytest.mark.parametrize(
    "text",
    ["&a [*a]", "name: &a {b: *a}", "[" * 2_000, "a: " * 3, "{" * 900 + "}" * 900, "name: ${dataset.path}${name}"],
)
def test_what_holds_itself_or_is_nested_too_deep_is_refused(text: str, tmp_path: Path) -> None:
    refused(tmp_path, text if text.startswith(("&", "[", "{", "a")) else SMALLEST + text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!python/object/apply:os.system [touch owned]", "not valid YAML"),
        ("!!python/name:os.system", "not valid YAML"),
        ("!!int ''", "not valid YAML"),
        ("!!float x", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("!!bool x", "not valid YAML"),
        ("!!binary aGk=", "name: "),
        ("!!set {a, b}", ""),
        ("9" * 5_000, "not valid YAML"),
        ("{[1]: 2}", ""),
        ("${oc.env:NO_SUCH_VARIABLE}", "job.yaml: "),
        ("${nosuch:1}", "job.yaml: "),
        ("${", "job.yaml: "),
    ],
)
def test_tags_and_interpolations_make_nothing_but_values(value: str, words: str, tmp_path: Path) -> None:
    assert words in refused(tmp_path, f"{SMALLEST}name: {value}\n")
    assert not (Path.cwd() / "owned").exists()


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe\0", b"PAR1\0\0\x15\x04PAR1", b"a\0b: 1", b"\x7fELF\x02", b"- 1\n- 2", b"just words", b"3"],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    assert refused(tmp_path, data).startswith(f"{tmp_path}/job.yaml: ")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sampling.params", "{fail: {0: x}}", "sampling.params.fail: the key 0 is not text (in override "),
        ("model.options", "{a: [[.inf]]}", "model.options.a[0][0]: inf is not a finite number"),
        ("model.options", "{a: [!!binary aGk=]}", "model.options.a[0]: b'hi' (bytes) is not text, a number"),
    ],
)
def test_what_a_frozen_plan_would_not_give_back_is_refused_at_any_depth(
    key: str, value: str, words: str, tmp_path: Path
) -> None:
    assert words in refused(tmp_path, SMALLEST, "model.family=diffusers", f"{key}={value}")


def test_names_too_long_for_any_disk_are_only_names(tmp_path: Path) -> None:
    told = refused(tmp_path, SMALLEST, f"model.loras=[{{path: {'x' * 5_000}, weight: x}}]")
    assert "model.loras[0].weight" in told
