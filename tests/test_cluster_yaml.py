"""cluster.yaml is accepted by Ray and by EC2's own description of a machine, without account or network."""

import copy
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_YAML = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text())


@pytest.fixture(scope="module")
def ec2_machine() -> Any:
    """What EC2's RunInstances takes, from the service description inside botocore."""
    return botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check_by_ray(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def ec2_faults(node_config: dict[str, Any], ec2_machine: Any) -> str:
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    return ParamValidator().validate(request, ec2_machine).generate_report()


def test_ray_accepts_it(cluster):
    check_by_ray(cluster)


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [
        ((), "idle_timeout_minute"),
        (("auth",), "ssh_usr"),
        (("available_node_types", "gpu_spot"), "label"),
        (("available_node_types", "cpu"), "max_worker"),
    ],
)
def test_ray_refuses_a_misspelt_key(cluster, path, misspelt):
    wrong = copy.deepcopy(cluster)
    place = wrong
    for key in path:
        place = place[key]
    place[misspelt] = 1
    with pytest.raises(jsonschema.ValidationError, match=misspelt):
        check_by_ray(wrong)


def test_ec2_knows_every_machine_setting(cluster, ec2_machine):
    for name, node_type in cluster["available_node_types"].items():
        assert not ec2_faults(node_type["node_config"], ec2_machine), name
        assert node_type["node_config"]["InstanceType"] in ec2_machine.members["InstanceType"].enum, name


def test_a_setting_ec2_does_not_know_is_found(cluster, ec2_machine):
    wrong = {**cluster["available_node_types"]["cpu"]["node_config"], "InstanceTyp": "m7i.large"}
    assert "InstanceTyp" in ec2_faults(wrong, ec2_machine)


def test_the_head_takes_no_work(cluster):
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_labels_say_how_a_machine_is_paid(cluster):
    for name, node_type in cluster["available_node_types"].items():
        market = node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        assert node_type["labels"]["ray.io/market-type"] == market, name


def test_every_start_asks_for_a_token_and_the_dashboard_stays_local(cluster):
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_nodes_are_built_from_the_lock(cluster):
    assert (CLUSTER_YAML.parent / cluster["file_mounts"]["~/requirements.lock"]).is_file()
    installs = [command for command in cluster["setup_commands"] if "uv pip sync" in command]
    assert len(installs) == 1
    assert installs[0].endswith("~/requirements.lock")
