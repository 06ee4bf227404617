"""A planted secret is looked for wherever a person could see it."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from tests.fleet.inline import config_for, write_prompts
from tests.store.conftest import SECRET
from tests.store.proxy import Fault, Proxy
from vidgen import cli, config
from vidgen.errors import ConfigError
from vidgen.fleet.failures import describe
from vidgen.fleet.opening import open_store
from vidgen.plan.build import build
from vidgen.plan.files import read_plan, rejected_reasons
from vidgen.redaction import Secrets, refuse_credentials, shown
from vidgen.store.objects import Objects

CARRYING = {
    "s3 login": f"s3://AKIAPLANTED:{SECRET}@bucket/run",
    "sftp login": f"sftp://me:{SECRET}@host/run",
    "azure signature": f"abfs://c@account.dfs.core.windows.net/run?sv=2024&sig={SECRET}",
    "presigned": f"https://bucket.s3.amazonaws.com/run?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
}
INNOCENT = (
    "s3://bucket/run/a:b@c",
    "abfs://container@account.dfs.core.windows.net/run",
    "sftp://me@host/run",
    "webdav://host:8080/run@2",
    "/data/run=1/a@b:c",
    "gs://bucket/run",
)


@pytest.mark.parametrize("name", CARRYING)
def test_an_output_that_carries_credentials_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"carries credentials.*environment") as told:
        open_store(config_for(write_prompts(tmp_path / "p.parquet", 1), CARRYING[name]))
    assert SECRET not in "".join(traceback.format_exception(told.value))


@pytest.mark.parametrize("key", ["dataset.path", "model.checkpoint", "output.path"])
@pytest.mark.parametrize("name", CARRYING)
def test_a_configuration_that_carries_credentials_is_refused_without_showing_them(
    name: str, key: str, tmp_path: Path
) -> None:
    values = config.to_dict(config_for(write_prompts(tmp_path / "p.parquet", 1), str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=f"^{key}: .*carries credentials.*environment") as told:
        config.from_dict(values, overrides=[f"{key}={CARRYING[name]}"])
    assert SECRET not in "".join(traceback.format_exception(told.value))


def test_an_adapter_or_a_medium_that_carries_credentials_is_refused_too(tmp_path: Path) -> None:
    signed = CARRYING["presigned"]
    values = config.to_dict(config_for(write_prompts(tmp_path / "p.parquet", 1), str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"^model.loras\[0\].path: .*carries credentials") as told:
        config.from_dict({**values, "model": {**values["model"], "loras": [{"path": signed}]}})
    assert SECRET not in str(told.value)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    prompts = write_prompts(tmp_path / "media.parquet", 2, picture=[signed, "red.png"])
    job = config_for(prompts, str(tmp_path / "out"), model__task="i2v")
    job.dataset.columns["image"] = "picture"
    objects = Objects(job.output.path)
    build(job, objects)
    (plan,) = read_plan(objects)
    assert (plan.counts["items"], plan.counts["rejected"]) == (1, 1)
    ((reason, rows),) = rejected_reasons(objects, [plan]).items()
    assert rows == 1 and "picture" in reason and "carries credentials" in reason
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("url", INNOCENT)
def test_a_url_without_credentials_is_left_as_it_is(url: str) -> None:
    assert shown(url) == url
    refuse_credentials(url)


def test_the_command_line_shows_no_credentials_of_a_url(capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["verify"], ["generate"]):
        assert cli.main([*command, CARRYING["s3 login"], "--debug"]) == 2
    shown_to_a_person = "".join(capfd.readouterr())
    assert "carries credentials" in shown_to_a_person and SECRET not in shown_to_a_person


def test_what_a_library_says_is_cleaned_whatever_option_held_the_secret() -> None:
    options = {"client_kwargs": {"aws_session_token": "tok-123456"}, "token": {"private_key": "pem-123456"}, "key": "k"}
    clean = Secrets({**options, "endpoint_url": "http://store.example"}).clean
    assert clean("bad tok-123456, pem-123456 at http://store.example, key k") == (
        "bad ***, *** at http://store.example, key k"
    )
    assert clean("DefaultEndpointsProtocol=http;AccountKey=abc/def==;x") == (
        "DefaultEndpointsProtocol=http;AccountKey=***;x"
    )


def test_credentials_of_the_environment_are_cleaned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert Secrets({}).clean(f"signed with {SECRET}") == "signed with ***"


@pytest.mark.parametrize("fault", [(403, "SignatureDoesNotMatch"), (500, "InternalError")])
def test_an_error_that_quotes_the_secret_is_shown_without_it(
    spoilt: Objects, proxy: Proxy, fault: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.store.retry.FIRST_PATIENCE", 0.1)
    status, code = fault
    proxy.spoil(Fault("answer", times=99, status=status, code=code, message=f"you signed with {SECRET}"))
    with pytest.raises(Exception) as told:
        spoilt.put("a", b"1")
    everything = "".join(traceback.format_exception(told.value)) + describe(told.value)
    assert code in everything and SECRET not in everything
    assert SECRET not in str(pickle.loads(pickle.dumps(told.value)))


def test_a_wrong_connection_string_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "abfs", {"connection_string": f"AccountName=a;AccountKey={SECRET};x"})
    with pytest.raises(ConfigError) as told:
        Objects("abfs://container/run")
    assert SECRET not in "".join(traceback.format_exception(told.value))


def test_nothing_that_a_run_wrote_or_printed_holds_the_secret(
    finished: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    objects = Objects(finished[0])
    seen = 0
    for entry in objects.list(""):
        data = objects.read(entry.path)
        assert SECRET.encode() not in data and b"AKIAPLANTEDKEYID" not in data, entry.path
        seen += 1
    assert seen > 10
    assert SECRET not in finished[1] + finished[2]
    assert cli.main(["status", finished[0], "--json"]) == 0
    assert SECRET not in json.dumps(capfd.readouterr().out)


@pytest.fixture
def finished(s3: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str, str]]:
    """A finished run on S3 with a report, and what it printed."""
    from tests.fleet.inline import drive
    from vidgen.report import gallery

    prompts = write_prompts(tmp_path / "p.parquet", ["one", "two", "three"], fails=["", "item", ""])
    config = config_for(prompts, s3)
    config.dataset.columns["params.fail"] = "fails"
    drive(config)
    gallery.report(s3)
    printed = capfd.readouterr()
    yield s3, printed.out, printed.err


INPUTS = {
    "dataset": {"dataset": {"path": "s3://planted/p.parquet"}},
    "datasets": {"dataset": {"path": "s3://planted/*.parquet"}},
    "checkpoint": {"model": {"family": "wan", "checkpoint": "s3://planted/wan"}},
    "family": {"model": {"family": "auto", "checkpoint": "s3://planted/wan"}},
    "adapter": {"model": {"family": "wan", "checkpoint": "demo", "loras": [{"path": "s3://planted/l.safetensors"}]}},
    "medium": {"model": {"family": "testcard", "task": "i2v"}, "dataset": {"columns": {"image": "picture"}}},
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_a_library_says_of_an_input_is_shown_and_kept_without_the_secret(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The address of the store, which the environment gives, holds a password; botocore quotes it."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://me:{SECRET}@127.0.0.1:9", "anon": True})
    prompts = write_prompts(tmp_path / "p.parquet", 2, picture=["s3://planted/p.png", "red.png"])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    rooms = {"model": {"family": "testcard"}, "dataset": {"path": prompts}, "output": {"path": str(tmp_path / "out")}}
    job = {room: {**rooms.get(room, {}), **INPUTS[name].get(room, {})} for room in rooms}
    (tmp_path / "job.yaml").write_text(json.dumps({"name": "planted", **job}))
    for options in (["--json"], ["--debug"]):
        assert cli.main(["plan", str(tmp_path / "job.yaml"), *options]) == (0 if name == "medium" else 2)
        shown_to_a_person = "".join(capfd.readouterr())
        assert "http://***@127.0.0.1:9" in shown_to_a_person and SECRET not in shown_to_a_person
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_what_a_replica_says_of_a_failure_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"secret": SECRET})
    assert describe(OSError(f"you signed with {SECRET}")) == "OSError: you signed with ***"
