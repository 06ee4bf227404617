"""The Kubernetes manifests, against the schemas of KubeRay and Kubernetes, and against what they promise."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.cluster.deployment import CLUSTER, MANIFESTS, cluster_spec, job_spec, pods, resources
from tests.cluster.schema import NoDuplicates, mappings, problems
from vidgen.fleet.run import TERMINATE_GRACE

RESOURCES = resources()
NAMES = [name for name, _ in RESOURCES]
CLUSTERS = {name: spec for name, document in RESOURCES if (spec := cluster_spec(document))}
WORKERS = [(f"{name}-{pod}", spec) for name, found in RESOURCES for pod, spec in pods(found) if "h100" in pod]
FREE = re.compile(r"\.(labels|annotations|nodeSelector|rayStartParams|requests|limits)$")
"""Maps whose keys are anybody's."""
FLUSH_SECONDS = 2
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.mark.parametrize("name,document", RESOURCES, ids=NAMES)
def test_a_manifest_is_what_its_definition_allows(name: str, document: dict[str, Any]) -> None:
    assert not problems(document, document["kind"])


@pytest.mark.parametrize("name,document", RESOURCES, ids=NAMES)
def test_a_misspelt_field_is_found_wherever_it_stands(name: str, document: dict[str, Any]) -> None:
    document = json.loads(json.dumps(document))  # no aliases
    places = dict(mappings(document))
    for mapping in places.values():
        mapping["mispelt"] = "x"
    complaints = {text.split(": ")[0] for text in problems(document, document["kind"]) if "mispelt" in text}
    assert all(FREE.search(path) for path in set(places) - complaints), set(places) - complaints


def test_a_key_that_stands_twice_is_found() -> None:
    with pytest.raises(yaml.YAMLError, match="replicas"):
        yaml.load("{replicas: 1, replicas: 2}", NoDuplicates)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_a_person_must_change_is_marked(path: Any) -> None:
    """Every placeholder stands on a line marked EDIT, or closely below one."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        code = line.split("#")[0] if line.lstrip().startswith("#") else line
        if re.search(r"\b(BUCKET|REGISTRY|ACCOUNT|PROJECT)\b", code):
            assert any("EDIT" in near for near in lines[max(0, number - 6) : number + 1]), (
                f"{path.name}:{number + 1}: {line}"
            )


@pytest.mark.parametrize("name,document", RESOURCES, ids=NAMES)
def test_no_manifest_holds_a_secret(name: str, document: dict[str, Any]) -> None:
    """Environment variables that name a secret come from a Secret, and no value looks like a key."""
    assert document["kind"] != "Secret"
    for pod, spec in pods(document):
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for variable in container.get("env", []):
                if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], f"{pod}: {variable['name']}"
    assert not re.search(r"hf_[A-Za-z0-9]{8}|AKIA[A-Z0-9]{8}|-----BEGIN|eyJ[A-Za-z0-9]{8}", str(document))


@pytest.mark.parametrize("name,document", RESOURCES, ids=NAMES)
def test_nothing_runs_as_root_but_what_opens_the_cache(name: str, document: dict[str, Any]) -> None:
    for pod, spec in pods(document):
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 1000, pod
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["capabilities"]["drop"] == ["ALL"], pod
            if context.get("runAsUser") == 0:
                assert container["command"] == ["chmod", "1777", "/cache"] and spec["volumes"][0].get("hostPath")


@pytest.mark.parametrize("name,spec", CLUSTERS.items(), ids=list(CLUSTERS))
def test_the_head_has_nothing_to_give_and_asks_for_a_token(name: str, spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert not any("gpu" in resource for resource in head["resources"]["limits"])
    assert head["lifecycle"]["preStop"]["exec"]["command"] == ["python", "/opt/vidgen/cluster/stop_drivers.py"]


@pytest.mark.parametrize("name,spec", CLUSTERS.items(), ids=list(CLUSTERS))
def test_the_autoscaler_may_do_what_it_is_for(name: str, spec: dict[str, Any]) -> None:
    """Version 2 needs pods that are not restarted. Spot is preferred, and every group can grow."""
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert len(groups) == len(spec["workerGroupSpecs"])
    assert groups["h100-spot"]["priority"] > groups["h100"]["priority"]
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and group["maxReplicas"] > 0
        assert group["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert sum(group["replicas"] for group in groups.values()) > 0, "a job takes the GPUs that are there"


def test_gangs_find_a_pod_with_eight_gpus_and_shared_memory() -> None:
    gpus = {pod: spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod, spec in WORKERS}
    assert set(gpus.values()) == {"1", "8"}
    for pod, spec in WORKERS:
        shm = [v for v in spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        assert bool(shm) == (gpus[pod] == "8"), pod


@pytest.mark.parametrize("pod,spec", WORKERS, ids=[pod for pod, _ in WORKERS])
def test_a_worker_pod_stays_longer_than_ray_drains_and_caches_on_its_node(pod: str, spec: dict[str, Any]) -> None:
    (worker,) = spec["containers"]
    drain = next(float(variable["value"]) for variable in worker["env"] if variable["name"] == DRAIN)
    grace = spec["terminationGracePeriodSeconds"]
    assert 0 < drain <= grace - 10, "Ray needs some seconds to go"
    assert grace <= 25 if pod.endswith("spot") else grace >= 600
    mounts = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
    (cache,) = (volume for volume in spec["volumes"] if mounts[volume["name"]] == "/cache")
    assert "hostPath" in cache or "emptyDir" in cache
    assert worker["resources"]["requests"] == worker["resources"]["limits"], "Guaranteed: the last to be evicted"


@pytest.mark.parametrize("name,spec", CLUSTERS.items(), ids=list(CLUSTERS))
def test_a_head_pod_stays_until_its_drivers_have_flushed(name: str, spec: dict[str, Any]) -> None:
    from cluster.stop_drivers import LONGEST_SECONDS

    pod = spec["headGroupSpec"]["template"]["spec"]
    assert LONGEST_SECONDS >= FLUSH_SECONDS + TERMINATE_GRACE
    assert pod["terminationGracePeriodSeconds"] >= LONGEST_SECONDS + 10
    assert {"name": DRAIN, "value": "0"} in pod["containers"][0]["env"], "else Ray waits, with nothing to wait for"


def test_the_three_clusters_say_the_same_of_the_same_things() -> None:
    """YAML cannot share across files; this holds the copies together."""

    def common(spec: dict[str, Any]) -> Any:
        groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
        options = {key: spec[key] for key in ("rayVersion", "authOptions", "autoscalerOptions", "headGroupSpec")}
        return options, groups["h100"], groups["h100-spot"]

    first, *others = CLUSTERS.values()
    assert len(others) == 2 and all(common(other) == common(first) for other in others)


def test_what_reads_the_token_names_the_secret_of_the_cluster_and_its_service() -> None:
    (cluster,) = (found for _, found in RESOURCES if found["kind"] == "RayCluster")
    (cron,) = (found for _, found in RESOURCES if found["kind"] == "CronJob")
    (container,) = next(pods(cron))[1]["containers"]
    name, variables = cluster["metadata"]["name"], {found["name"]: found for found in container["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert f"http://{name}-head-svc:8265" in container["command"]
    namespaces = {found["metadata"].get("namespace", "vidgen") for _, found in RESOURCES}
    accounts = {spec.get("serviceAccountName", "vidgen") for _, found in RESOURCES for _, spec in pods(found)}
    assert namespaces == accounts == {"vidgen"}


def test_jobs_are_tried_again_only_where_that_helps() -> None:
    for name, document in RESOURCES:
        if job := job_spec(document):
            assert job["shutdownAfterJobFinishes"] and job["backoffLimit"] > 0, name
            assert "--ok-exit 3,5,75" in job["entrypoint"], name
        if document["kind"] == "CronJob":
            assert document["spec"]["concurrencyPolicy"] == "Forbid"
            assert document["spec"]["jobTemplate"]["spec"]["backoffLimit"] == 0, "the next tick is the retry"


def test_the_readme_names_every_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in [*MANIFESTS, *(CLUSTER / "ray-up").iterdir(), *(CLUSTER / "slurm").iterdir()]:
        assert f"{path.parent.name}/{path.name}" in text, path
