"""Schemas that refuse what they do not know. Kubernetes drops unknown fields without a word; here a typo is an error.

Refuses to know what the manifests are for.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parent / "schemas"


class NoDuplicates(yaml.SafeLoader):
    """YAML in which a key stands once: PyYAML takes the last of two and says nothing."""


def _mapping(loader: NoDuplicates, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise yaml.YAMLError(f"{node.start_mark}: {sorted(twice)} twice")
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


NoDuplicates.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [found for found in yaml.load_all(path.read_text(), NoDuplicates) if found is not None]


@cache
def schema(name: str) -> dict[str, Any]:
    """The schema of a kind, closed: an object has the fields it lists and no others. The API server itself knows the
    metadata of a custom resource and of a pod template; the definitions leave them open."""
    found: dict[str, Any] = closed(json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes())))
    if name.startswith("Ray") or name == "PodMonitor":
        found["definitions"] = schema("Namespace")["definitions"]
        found["properties"]["metadata"] = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    return found


def closed(value: Any) -> Any:
    if isinstance(value, list):
        return [closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: closed(item) for key, item in value.items()}
    if isinstance(value.get("properties"), dict) and "type" in value:
        changed.setdefault("additionalProperties", False)
    return changed


def problems(document: Any, name: str) -> list[str]:
    """What is wrong with a document, with its place."""
    validator = jsonschema.Draft7Validator(schema(name))
    return [f"{_place(error)}: {error.message}" for error in validator.iter_errors(document)]


def _place(error: jsonschema.ValidationError) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)


def mappings(value: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each mapping in a document, with its place."""
    if isinstance(value, Mapping):
        assert isinstance(value, dict)
        yield path, value
        for key, item in value.items():
            yield from mappings(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from mappings(item, f"{path}[{index}]")
