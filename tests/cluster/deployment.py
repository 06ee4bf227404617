"""The files of `cluster/` as data: documents, pod templates, and the command lines that they run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.schema import documents

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IMAGE = "/opt/vidgen"
"""Where the image keeps the repository."""
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))


def resources() -> list[tuple[str, dict[str, Any]]]:
    """(file and kind, document) of everything that `kubectl apply` gets."""
    return [(f"{path.stem}-{found['kind']}", found) for path in MANIFESTS for found in documents(path)]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    """The RayCluster in a RayCluster, RayJob or RayCronJob."""
    spec: dict[str, Any] = document.get("spec", {})
    if document["kind"] == "RayCronJob":
        spec = spec["jobTemplate"]
    return spec if document["kind"] == "RayCluster" else spec.get("rayClusterSpec")


def job_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    """The RayJob in a RayJob or RayCronJob."""
    return {"RayJob": document.get("spec"), "RayCronJob": document.get("spec", {}).get("jobTemplate")}.get(
        document["kind"]
    )


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of each template in a document."""
    if cluster := cluster_spec(document):
        yield "head", cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]
    if job := job_spec(document):
        yield "submitter", job["submitterPodTemplate"]["spec"]
    if document["kind"] == "CronJob":
        yield "submitter", document["spec"]["jobTemplate"]["spec"]["template"]["spec"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A command line that runs in the image: the script, its configuration, and the rest."""

    name: str
    words: tuple[str, ...]

    @property
    def script(self) -> str:
        return self.words[1].removeprefix(f"{IMAGE}/")

    @property
    def config(self) -> str:
        return self.words[2].removeprefix(f"{IMAGE}/")


def entries() -> list[Entry]:
    """What manifests run, and what the comments of the other files say to submit."""
    found = []
    for name, document in resources():
        if job := job_spec(document):
            found.append(Entry(name, tuple(shlex.split(job["entrypoint"]))))
        if document["kind"] == "CronJob":
            (container,) = next(pods(document))[1]["containers"]
            assert container["command"][:3] == ["ray", "job", "submit"] and container["command"][-1] == "--"
            found.append(Entry(name, tuple(container["args"])))
    for path in [*RAY_UP, CLUSTER / "kuberay" / "raycluster.yaml"]:
        found.append(Entry(f"{path.stem}-comment", _submitted(path.read_text())))
    return found


def _submitted(text: str) -> tuple[str, ...]:
    """The words behind `ray job submit ... --` in the comment at the top of a file."""
    comment = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    (command,) = re.findall(r"ray job submit (?:.*\\\n)*.*", comment)
    words = shlex.split(command.replace("\\\n", " "))
    return tuple(words[words.index("--") + 1 :])
