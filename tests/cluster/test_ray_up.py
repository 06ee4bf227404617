"""The `ray up` files, against Ray's own schema and checks, and against the APIs that get their node configurations."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
from ray.autoscaler._private import util

from tests.cluster.deployment import RAY_UP
from tests.cluster.schema import documents, problems

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
API = {"aws": "aws-RunInstancesRequest", "gcp": "gcp-Instance"}


def config(path: Path) -> dict[str, Any]:
    (found,) = documents(path)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_takes_the_file(path: Path) -> None:
    found = config(path)
    jsonschema.validate(found, SCHEMA)
    util.validate_config(util.prepare_config(deepcopy(found)))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_the_cloud_takes_each_kind_of_node(path: Path) -> None:
    found = config(path)
    for name, kind in found["available_node_types"].items():
        assert not problems(kind["node_config"], API[found["provider"]["type"]]), name


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_a_misspelt_field_of_a_node_is_found(path: Path) -> None:
    found = config(path)
    for kind in found["available_node_types"].values():
        kind["node_config"]["Mispelt"] = 1
        assert any("Mispelt" in text for text in problems(kind["node_config"], API[found["provider"]["type"]]))
        with pytest.raises(jsonschema.ValidationError, match="mispelt"):
            kind["mispelt"] = 1
            jsonschema.validate(found, SCHEMA)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_the_head_has_nothing_to_give_and_the_token_is_on_every_node(path: Path) -> None:
    found = config(path)
    assert found["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in found["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in found["head_start_ray_commands"][-1], "reached through SSH alone"
    assert "--env RAY_AUTH_MODE=token" in found["docker"]["run_options"]
    assert found["file_mounts"] == {"~/.ray": "~/.ray"}


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_spot_is_preferred_and_there_is_a_machine_for_gangs(path: Path) -> None:
    kinds = config(path)["available_node_types"]
    (spot,) = (name for name in kinds if name.endswith("-spot"))
    (gangs,) = (name for name in kinds if name.endswith("x8"))
    assert kinds[spot]["priority"] > kinds[gangs]["priority"]
    assert kinds[spot]["min_workers"] > 0, "a job takes the GPUs that are there"
    assert "spot" in json.dumps(kinds[spot]["node_config"]).lower()
    assert "spot" not in json.dumps(kinds[gangs]["node_config"]).lower()
