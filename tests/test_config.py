"""The configuration: what is accepted, and that every mistake names its key, its place and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.config import JobConfig, from_dict, load, to_dict
from vidgen.config_rules import leaves
from vidgen.errors import ConfigError
from vidgen.plan.frozen import frozen_differences

SMALLEST: dict[str, Any] = {"dataset": {"path": "prompts.parquet"}, "output": {"path": "outputs/x"}}


def written(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def smallest(tmp_path: Path) -> str:
    return written(tmp_path, "dataset: {path: prompts.parquet}\noutput: {path: outputs/x}\n")


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_a_path_and_an_output_are_enough_and_null_means_the_familys_default(smallest: str) -> None:
    config = load(smallest)
    assert config.model.checkpoint == "demo" and config.model.family == "auto"
    assert all(v is None or v == {} for v in to_dict(config)["sampling"].values())


def test_overrides_win_over_the_file_in_their_order(smallest: str) -> None:
    config = load(smallest, ["sampling.height=480", "sampling.height=512", "sampling.fps=8", "engine.threads=2"])
    assert config.sampling.height == 512 and config.sampling.fps == 8.0 and config.engine.threads == 2


def test_text_keys_take_what_yaml_would_read_as_something_else(smallest: str) -> None:
    config = load(smallest, ["name=2024", "dataset.where=topic = 'a: b' and n > 3", "model.revision=1234567"])
    assert config.name == "2024" and config.model.revision == "1234567"
    assert config.dataset.where == "topic = 'a: b' and n > 3"


def test_a_bare_on_or_off_of_yaml_is_the_word(tmp_path: Path, smallest: str) -> None:
    assert load(smallest, ["engine.vae_tiling=on"]).engine.vae_tiling == "on"
    text = "dataset: {path: p}\noutput: {path: o}\nengine: {vae_tiling: off}\n"
    assert load(written(tmp_path, text)).engine.vae_tiling == "off"


def test_params_may_be_nested_or_dotted(smallest: str) -> None:
    nested = load(smallest, ["dataset.columns={prompt: p, params: {strength: s}}", "sweep.over.params.strength=[1, 2]"])
    assert nested.dataset.columns == {"prompt": "p", "params.strength": "s"}
    assert nested.sweep.over == {"params.strength": [1, 2]}


def test_an_unknown_key_is_named_with_its_source_and_its_nearest_neighbours(smallest: str) -> None:
    message = refused(smallest, "sampling.hieght=480")
    assert "sampling.hieght" in message and "override 'sampling.hieght=480'" in message and "'height'" in message
    assert "'sampling.height'" in refused(smallest, "height=480")
    assert "'sampling'" in refused(smallest, "samplng.height=480")


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "dataset: {path: p, colums: {}}\noutput: {path: o}\n")
    message = refused(path)
    assert "dataset.colums" in message and path in message and "'columns'" in message


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "sampling: {hight: 1, steps: 2}\nrun: {lease: soon}\n")
    message = refused(path)
    assert all(key in message for key in ("sampling.hight", "sampling.steps", "run.lease"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.height=tall", ("sampling.height", "'tall'", "a whole number")),
        ("sampling.height=480.5", ("sampling.height", "480.5", "a whole number")),
        ("sampling.height=true", ("sampling.height", "true", "a whole number")),
        ("sampling.sigmas=[1, x]", ("sampling.sigmas", "a list of a number")),
        ("run.max_attempts=null", ("run.max_attempts", "null", "a whole number")),
        ("sampling=3", ("sampling", "not a mapping", "num_frames")),
        ("sampling.height=0", ("sampling.height", "1 or more")),
        ("sampling.fps=0", ("sampling.fps", "more than 0")),
        ("sampling.shift=.nan", ("sampling.shift", "finite")),
        ("run.lease=30", ("run.lease", "45 or more")),
        ("run.deadline=soon", ("run.deadline", "'soon'", "HH:MM")),
        ("dataset.on_long_prompt=cut", ("dataset.on_long_prompt", "'truncate', 'reject'")),
        ("engine.threads=many", ("engine.threads", "auto")),
        ("dataset.columns.promt=text", ("dataset.columns.promt", "'prompt'")),
        ("dataset.columns={prompt: 3}", ("dataset.columns.prompt", "name of a column")),
        ("sweep.over.seed=[1, 2]", ("sweep.over.seed", "cannot", "can be swept")[::2]),
        ("sweep.over.height=480", ("sweep.over.height", "not a list")),
        ("sweep.over.height=[480, tall]", ("sweep.over.height", "'tall'")),
        ("nonsense", ("nonsense", "key=value")),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(smallest: str, override: str, words: tuple[str, ...]) -> None:
    message = refused(smallest, override)
    assert all(word in message for word in words), message
    assert "override" in message


@pytest.mark.parametrize(
    "override",
    [
        "engine.quantization=fp8",
        "engine.offload=sequential",
        "engine.compile=on",
        "engine.attention=sage",
        "model.pipeline=WanPipeline",
    ],
)
def test_what_this_version_cannot_do_is_refused_by_key_and_value(smallest: str, override: str) -> None:
    key, _, value = override.partition("=")
    message = refused(smallest, override)
    assert key in message and "not available in this version" in message and "allowed: " in message
    assert value.strip("[]") in message


def test_a_zip_sweep_needs_lists_of_one_length(smallest: str) -> None:
    overrides = ["sweep.mode=zip", "sweep.over.height=[64, 128]", "sweep.over.width=[64]"]
    assert "height 2, width 1" in refused(smallest, *overrides)


@pytest.mark.parametrize("text", ["just words", "- a\n- b\n", "a: [", "name: ${nowhere}\n"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert path in refused(path)


def test_a_time_that_yaml_takes_for_a_number_is_to_be_quoted(tmp_path: Path) -> None:
    message = refused(written(tmp_path, "run: {deadline: 22:00}\n"))
    assert "run.deadline: 1320" in message and "in quotes" in message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "nowhere.yaml: there is nothing of that name" in refused("nowhere.yaml")
    assert f"{tmp_path}: a folder; a configuration is a YAML file" in refused(str(tmp_path))


def test_missing_paths_are_required_keys(tmp_path: Path) -> None:
    message = refused(written(tmp_path, "name: x\n"))
    assert "dataset.path: required" in message and "output.path: required" in message


KEYS = sorted(key for key, _ in leaves(to_dict(JobConfig())))


@settings(deadline=None, max_examples=20)
@given(st.text(st.characters(codec="ascii", categories=["Ll", "Nd"]), min_size=1, max_size=12))
def test_no_key_is_passed_over_in_silence(name: str) -> None:
    for room in ("sampling", "run"):
        if f"{room}.{name}" in KEYS or (room == "sampling" and name == "params"):
            continue
        with pytest.raises(ConfigError, match=f"{room}.{name}: unknown key"):
            from_dict({**SMALLEST, room: {name: 1}})


sampling = st.fixed_dictionaries(
    {},
    optional={
        "height": st.integers(1, 5000),
        "fps": st.floats(0.1, 120) | st.integers(1, 120),
        "guidance_scale": st.floats(0, 100),
        "negative_prompt": st.text(st.characters(exclude_characters="$", exclude_categories=["Cs"])),
        "seed": st.integers(-(2**63), 2**63),
        "sigmas": st.lists(st.floats(0, 1)),
        "params": st.dictionaries(st.text("ab", min_size=1), st.integers() | st.booleans() | st.none()),
    },
)


@settings(deadline=None, max_examples=20)
@given(sampling, st.integers(1, 100) | st.just("auto"), st.lists(st.integers(1, 9), min_size=1))
def test_a_configuration_survives_being_written_and_read(values: dict, replicas: int | str, swept: list[int]) -> None:
    written = {
        **SMALLEST,
        "sampling": values,
        "parallel": {"replicas": replicas},
        "sweep": {"over": {"guidance_scale": swept}},
    }
    config = from_dict(written)
    assert from_dict(to_dict(config)) == config
    assert all(to_dict(config)["sampling"][name] == value for name, value in values.items())
    assert frozen_differences(to_dict(config), to_dict(from_dict(to_dict(config)))) == []


def differences(before: dict[str, Any], after: dict[str, Any], **options: Any) -> list[str]:
    first, second = (to_dict(from_dict({**SMALLEST, **values})) for values in (before, after))
    return frozen_differences(first, second, **options)


@pytest.mark.parametrize(
    ("room", "key", "before", "after"),
    [
        ("sampling", "height", 64, 128),
        ("sampling", "height", None, 128),
        ("dataset", "limit", 10, None),
        ("dataset", "where", None, "n = 1"),
        ("output", "crf", 18, 20),
        ("engine", "vae_tiling", "auto", "on"),
        ("sweep", "mode", "product", "zip"),
        ("model", "checkpoint", "demo", "other"),
    ],
)
def test_a_changed_frozen_key_is_shown_with_both_values(room: str, key: str, before: object, after: object) -> None:
    (found,) = differences(
        {room: {**SMALLEST.get(room, {}), key: before}}, {room: {**SMALLEST.get(room, {}), key: after}}
    )
    assert found.startswith(f"{room}.{key}: the plan has ")
    assert all(("null" if v is None else repr(v)) in found for v in (before, after))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"parallel": {"replicas": 7}},
        {"run": {"max_attempts": 9}},
        {"engine": {"threads": 3}},
        {"model": {"cache_dir": "/tmp/x"}},
        {"dataset": {"path": "prompts.parquet", "max_rejected": 3}},
    ],
)
def test_free_keys_may_change_on_resume(change: dict[str, Any]) -> None:
    assert differences({}, change) == []


def test_a_null_keeps_what_the_plan_resolved() -> None:
    assert differences({"sampling": {"height": 64}}, {}) == []
    resolved = {"sampling": {"height": 480}}
    assert differences({}, {"sampling": {"height": 480}}, resolved=resolved) == []
    assert len(differences({}, {"sampling": {"height": 481}}, resolved=resolved)) == 1


def test_an_extension_may_change_the_dataset_keys_it_is_for_and_nothing_else() -> None:
    more = {"path": "more.parquet", "limit": 9, "where": "n = 1", "samples_per_row": 2}
    assert differences({}, {"dataset": more}, extend=True) == []
    assert len(differences({}, {"dataset": {**more, "id_column": "n"}}, extend=True)) == 1
    assert len(differences({}, {"dataset": more})) == 4
