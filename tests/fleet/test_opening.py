"""Opening a run: what is refused before anything starts."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, write_prompts
from vidgen.errors import ConfigError
from vidgen.fleet.driver import Limits
from vidgen.fleet.opening import SUBMITTED, deadline_of, open_store, prepare
from vidgen.fleet.run import limits_of

NOW = datetime(2026, 5, 1, 22, 30, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("06:00", datetime(2026, 5, 2, 6, 0, tzinfo=NOW.tzinfo)),
        ("23:00", datetime(2026, 5, 1, 23, 0, tzinfo=NOW.tzinfo)),
        ("2026-05-03T12:00", datetime(2026, 5, 3, 12, 0, tzinfo=NOW.tzinfo)),
        ("2026-05-03T12:00+00:00", datetime(2026, 5, 3, 12, 0, tzinfo=timezone.utc)),
    ],
)
def test_a_deadline_is_a_time_of_day_or_a_date(text: str, expected: datetime) -> None:
    assert deadline_of(text, NOW) == expected.timestamp()


def test_a_deadline_that_is_no_time_is_a_configuration_error_that_shows_it() -> None:
    with pytest.raises(ConfigError, match="'tomorrow'"):
        deadline_of("tomorrow", NOW)


def test_a_driver_is_given_the_budget_and_the_deadline_of_the_configuration() -> None:
    config = config_for("p.parquet", "memory://x", run__max_gpu_hours=1.5, run__deadline="2026-05-01T06:00+00:00")
    assert limits_of(config) == Limits(5400.0, datetime(2026, 5, 1, 6, tzinfo=timezone.utc).timestamp())
    assert limits_of(config_for("p.parquet", "memory://x")) == Limits(None, None)


def test_a_relative_output_is_refused_in_a_submitted_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SUBMITTED, "{}")
    with pytest.raises(ConfigError, match=r"output\.path: 'outputs/x' is relative"):
        open_store(config_for("p.parquet", "outputs/x"))
    open_store(config_for("p.parquet", str(tmp_path)))


def test_a_missing_output_path_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"output\.path"):
        open_store(config_for("p.parquet", ""))


def test_a_changed_frozen_key_is_refused_with_both_values_and_a_free_one_is_not(tmp_path: Path) -> None:
    dataset, output = write_prompts(tmp_path / "p.parquet", 2), str(tmp_path / "out")
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{family: testcard}}\ndataset: {{path: {dataset}}}\n"
        f"sampling: {{num_frames: 5}}\noutput: {{path: {output}}}\n"
    )
    assert prepare(str(config), [], print).items == 2
    with pytest.raises(ConfigError, match=r"sampling\.num_frames.*5.*9"):
        prepare(str(config), ["sampling.num_frames=9"], print)
    assert prepare(str(config), ["run.max_attempts=7"], print).config.run.max_attempts == 7


def test_a_resume_whose_gangs_cannot_be_is_refused_before_a_cluster_is_asked(tmp_path: Path) -> None:
    dataset, output = write_prompts(tmp_path / "p.parquet", 2), str(tmp_path / "out")
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {{family: testcard}}\ndataset: {{path: {dataset}}}\noutput: {{path: {output}}}\n")
    prepare(str(config), [], print)
    for source in (str(config), output):
        with pytest.raises(ConfigError, match="testcard runs on one GPU"):
            prepare(source, ["parallel.context=2"], print)
        assert prepare(source, ["parallel.replicas=2"], print).items == 2


def test_an_estimate_that_nobody_lived_to_write_is_written_by_the_next_start(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    dataset = write_prompts(tmp_path / "p.parquet", 2)
    config.write_text(
        f"model: {{family: testcard}}\ndataset: {{path: {dataset}}}\noutput: {{path: {tmp_path / 'out'}}}\n"
    )
    prepare(str(config), [], print)
    place = tmp_path / "out/estimate.json"
    written = json.loads(place.read_text())
    place.unlink()
    prepare(str(config), [], print)
    assert json.loads(place.read_text())["shapes"] == written["shapes"]


def test_a_run_is_resumed_from_its_output_alone_even_where_it_was_moved(tmp_path: Path) -> None:
    dataset, output = write_prompts(tmp_path / "p.parquet", 2), tmp_path / "out"
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {{family: testcard}}\ndataset: {{path: {dataset}}}\noutput: {{path: {output}}}\n")
    prepare(str(config), [], print)
    moved = tmp_path / "elsewhere"
    output.rename(moved)
    run = prepare(str(moved), [], print)
    assert (run.items, run.objects.root) == (2, str(moved))


@pytest.mark.parametrize(
    ("cpus", "fit", "pending", "wanted", "threads", "expected"),
    [
        (2, 9, 100, None, None, (2, 1, 1.0)),  # one a core
        (16, 4, 100, None, None, (4, 4, 4.0)),  # what fits into memory, and the cores divided
        (16, 99, 3, None, None, (3, 5, 5.0)),  # no more than there is to do
        (16, 99, 100, None, 4, (4, 4, 4.0)),  # threads said: as many as have their cores
        (2, 9, 100, 1, None, (1, 2, 2.0)),
        (2, 9, 100, 3, None, (3, 1, 0.6666)),  # more than cores is the user's wish; Ray must be able to place them
        (2, 0, 100, None, None, (1, 2, 2.0)),  # one is always tried
        (2, 9, 100, None, 8, (1, 8, 2.0)),
    ],
)
def test_replicas_on_a_cpu_divide_its_cores(
    cpus: int, fit: int, pending: int, wanted: int | None, threads: int | None, expected: tuple[int, int, float]
) -> None:
    from vidgen.fleet.run import cpu_replicas

    assert cpu_replicas(cpus, fit, pending, wanted, threads) == expected
    assert expected[0] * expected[2] <= cpus
