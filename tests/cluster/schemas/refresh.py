"""Makes the JSON Schemas of this folder from their sources; README.md says which. Not run by tests.

pip install kubernetes-validate google-api-python-client botocore
npm pack @kubernetes-models/prometheus-operator@1.6.3 && tar xzf kubernetes-models-prometheus-operator-1.6.3.tgz
python tests/cluster/schemas/refresh.py FOLDER_OF_KUBERAY_CRDS package/monitoring.coreos.com/v1/PodMonitor.js
    # kuberay: helm-chart/kuberay-operator/crds
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KUBERNETES = {
    "CronJob": "io.k8s.api.batch.v1.CronJob",
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
}
SCALARS = {"integer": "integer", "long": "integer", "float": "number", "double": "number", "boolean": "boolean"}


def main(crds: Path, pod_monitor: Path) -> None:
    for path in sorted(crds.glob("ray.io_*.yaml")):
        definition = yaml.safe_load(path.read_text())["spec"]
        if definition["names"]["kind"] in ("RayCluster", "RayJob", "RayCronJob"):
            (v1,) = (version for version in definition["versions"] if version["name"] == "v1")
            write(definition["names"]["kind"], v1["schema"]["openAPIV3Schema"])
    for kind, name in KUBERNETES.items():
        write(kind, {"$ref": f"#/definitions/{name}", "definitions": reachable(kubernetes(), {name})})
    gcp = {name: closed(schema) for name, schema in compute().items()}
    write("gcp-Instance", {"$ref": "#/definitions/Instance", "definitions": reachable(gcp, {"Instance"})})
    ec2 = {name: from_shape(shape) for name, shape in shapes().items()}
    name = "RunInstancesRequest"
    write(f"aws-{name}", {"$ref": f"#/definitions/{name}", "definitions": reachable(ec2, {name})})
    write("PodMonitor", operators(pod_monitor.read_text()))


def write(name: str, schema: Mapping[str, Any]) -> None:
    text = json.dumps(without_prose(schema), sort_keys=True, separators=(",", ":")).encode()
    (HERE / f"{name}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


def without_prose(value: Any, names: bool = False) -> Any:
    """Without descriptions; `names`: the keys are names of fields, not of the schema language."""
    if isinstance(value, list):
        return [without_prose(item) for item in value]
    if not isinstance(value, dict):
        return value
    prose = () if names else ("description", "enumDescriptions", "documentation", "annotations", "id")
    return {
        key: without_prose(item, not names and key in ("properties", "definitions"))
        for key, item in value.items()
        if key not in prose
    }


def references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for item in value.values():
            yield from references(item)


def reachable(schemas: Mapping[str, Any], wanted: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while missing := wanted - set(found):
        for name in missing:
            found[name] = schemas[name]
            wanted = wanted | set(references(schemas[name]))
    return found


def kubernetes() -> dict[str, Any]:
    root = Path(str(resources.files("kubernetes_validate"))) / "kubernetes-json-schema"
    versions = {tuple(map(int, path.name[1:].split("-")[0].split("."))): path for path in root.glob("v*-local-strict")}
    return dict(local(json.loads((versions[max(versions)] / "_definitions.json").read_text())["$defs"]))


def compute() -> dict[str, Any]:
    place = resources.files("googleapiclient") / "discovery_cache" / "documents" / "compute.v1.json"
    return dict(local(json.loads(place.read_text())["schemas"]))


def local(value: Any) -> Any:
    """References to `#/definitions/`, however they were written."""
    if isinstance(value, list):
        return [local(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: f"#/definitions/{item.rpartition('/')[2]}" if key == "$ref" and isinstance(item, str) else local(item)
        for key, item in value.items()
    }


def operators(module: str) -> dict[str, Any]:
    """The schema in a JavaScript module made from a custom resource definition; what it takes from Kubernetes' own
    definitions (metadata) is left open."""
    text = module.partition("const schema = ")[2].partition(";\n")[0]
    found: dict[str, Any] = json.loads(text)
    found["properties"]["metadata"] = {"type": "object"}
    return found


def closed(schema: Any) -> Any:
    """Google's discovery format: an object lists all of its fields; 64-bit numbers may be strings or numbers."""
    if not isinstance(schema, dict):
        return schema
    changed = {key: closed(item) for key, item in schema.items() if key not in ("default", "required", "annotations")}
    if schema.get("format") in ("int64", "uint64"):
        changed["type"] = ["string", "integer"]
    if isinstance(schema.get("properties"), dict):
        changed["properties"] = {key: closed(item) for key, item in schema["properties"].items()}
        changed.setdefault("additionalProperties", False)
    return changed


def shapes() -> dict[str, Any]:
    import botocore.loaders

    return dict(botocore.loaders.Loader().load_service_model("ec2", "service-2")["shapes"])


def from_shape(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A shape of AWS's service model as JSON Schema."""
    kind = shape["type"]
    if kind == "structure":
        members = {name: {"$ref": f"#/definitions/{m['shape']}"} for name, m in shape["members"].items()}
        return {"type": "object", "properties": members, "additionalProperties": False}
    if kind == "list":
        return {"type": "array", "items": {"$ref": f"#/definitions/{shape['member']['shape']}"}}
    if kind in SCALARS:
        return {"type": SCALARS[kind]}
    return {"type": "string", **({"enum": shape["enum"]} if "enum" in shape else {})}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
