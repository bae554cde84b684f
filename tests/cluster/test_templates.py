"""jobs/cluster/ is accepted by those who read it: Ray's cluster launcher, KubeRay's schema, `ray symmetric-run`."""

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

from mmkt_ray.arguments import build_parser
from mmkt_ray.config import load_config, parse_override

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "jobs" / "cluster"


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def onprem() -> dict[str, Any]:
    return read_yaml(TEMPLATES / "onprem.yaml")


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return read_yaml(TEMPLATES / "rayjob.yaml")


@pytest.fixture
def slurm() -> str:
    return (TEMPLATES / "slurm.sh").read_text()


def check_by_ray(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def check_by_schema(rayjob: dict[str, Any]) -> None:
    schema = read_yaml(Path(__file__).with_name("rayjob_schema.yaml"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(rayjob, schema)


def pod_specs(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """Of head and worker groups."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def misspell(parsed: dict[str, Any], path: tuple[str | int, ...], key: str) -> None:
    place: Any = parsed
    for step in path:
        place = place[step]
    place[key] = 1


def test_ray_accepts_the_onprem_file(onprem):
    """Catches a key that the installed Ray has dropped, and workers that are left out of the cluster."""
    check_by_ray(onprem)
    node_type = prepare_config(onprem)["available_node_types"]["local.cluster.node"]
    assert node_type["min_workers"] == node_type["max_workers"] == len(onprem["provider"]["worker_ips"])


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [((), "worker_start_ray_command"), (("auth",), "ssh_usr"), ((), "setup_command")],
)
def test_ray_refuses_a_misspelt_key_of_the_onprem_file(onprem, path, misspelt):
    """Catches a check that accepts anything."""
    misspell(onprem, path, misspelt)
    with pytest.raises(jsonschema.ValidationError, match=misspelt):
        check_by_ray(onprem)


def test_onprem_nodes_are_built_as_those_on_aws(onprem):
    """Catches environment steps that were changed in one of the two files; only the system package is AWS's alone."""
    cluster = read_yaml(ROOT / "cluster.yaml")
    assert onprem["setup_commands"] == [step for step in cluster["setup_commands"] if "apt-get" not in step]
    assert onprem["file_mounts"] == cluster["file_mounts"]


def test_onprem_head_takes_no_work_and_every_start_asks_for_a_token(onprem):
    """Catches a start without authentication, and a dashboard, which runs code, that listens to the network."""
    head, worker = onprem["head_start_ray_commands"][-1], onprem["worker_start_ray_commands"][-1]
    assert "--num-cpus=0 --num-gpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker


def test_the_rayjob_fits_the_schema(rayjob):
    """Catches a field that KubeRay or Kubernetes does not know, and a number where they want text."""
    check_by_schema(rayjob)


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [
        (("spec",), "entryPoint"),
        (("spec", "rayClusterSpec"), "workerGroups"),
        (("spec", "rayClusterSpec", "autoscalerOptions"), "idleTimeoutMinutes"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1), "maxReplica"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "resource"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-gpus"),  # 1 is no text
    ],
)
def test_a_misspelt_key_of_the_rayjob_is_found(rayjob, path, misspelt):
    """Catches a schema that lets unknown keys pass somewhere."""
    misspell(rayjob, path, misspelt)
    with pytest.raises(jsonschema.ValidationError, match=rf"{misspelt}|1 is not of type 'string'"):
        check_by_schema(rayjob)


def test_the_rayjob_runs_what_is_locked_with_a_head_that_takes_no_work(rayjob):
    """Catches a Ray version that the image won't have, a head that works,
    and an entry point that `mmkt` would refuse."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements.lock").read_text().split()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    python, script, *arguments = shlex.split(rayjob["spec"]["entrypoint"])
    assert (python, script) == ("python", "jobs/run.py")
    args = build_parser().parse_args(["run", *arguments])
    config = load_config(str(ROOT / args.config), dict(parse_override(text) for text in args.overrides))
    (mount,) = pod_specs(rayjob)[0]["containers"][0]["volumeMounts"]
    assert config.run_root.startswith(f"{mount['mountPath']}/")


def test_no_pod_of_the_rayjob_is_root_or_without_limits(rayjob):
    """Catches a pod that may do more than it needs, or that takes a node's memory from others."""
    for pod in pod_specs(rayjob):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pod_specs(rayjob)[2]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def symmetric_run_words(slurm: str) -> list[str]:
    """What `ray symmetric-run` would be given, with bash's own expansion of the variables."""
    (command,) = re.findall(r"(?<=ray symmetric-run) .*", slurm.replace("\\\n", " "))
    granted = {"RAY_ADDRESS": "10.0.0.1:6379", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "16"}
    expand = ["bash", "-euc", f"printf '%s\\n' {command}", "slurm.sh", "jobs/configs/openmoji.yaml"]
    return subprocess.run(expand, env=granted, capture_output=True, text=True, check=True).stdout.splitlines()


def check_by_symmetric_run(words: list[str]) -> dict[str, Any]:
    """The options of `ray start` among them, parsed as `ray symmetric-run` and the `ray start` that it calls do."""
    ours = words[: words.index("--")]
    parsed = symmetric_run.make_context("ray symmetric-run", list(ours)).params
    assert (parsed["address"], parsed["min_nodes"]) == ("10.0.0.1:6379", 4)
    return start.make_context("ray start", curate_and_validate_ray_start_args(ours)).params


def test_bash_and_ray_understand_the_slurm_script(slurm):
    """Catches a syntax error, and an option that the installed `ray symmetric-run` or `ray start` does not take."""
    subprocess.run(["bash", "-n", TEMPLATES / "slurm.sh"], check=True)
    words = symmetric_run_words(slurm)
    options = check_by_symmetric_run(words)
    assert (options["num_cpus"], options["num_gpus"], options["disable_usage_stats"]) == (16, 0, True)
    assert words[words.index("--") + 1 :] == ["python", "jobs/run.py", "jobs/configs/openmoji.yaml"]


@pytest.mark.parametrize(("right", "wrong"), [("--num-cpus", "--num-cpu"), ("--num-cpus=", "--port ")])
def test_an_option_that_ray_does_not_take_is_found(slurm, right, wrong):
    """Catches a check that accepts anything."""
    with pytest.raises(click.ClickException):
        check_by_symmetric_run(symmetric_run_words(slurm.replace(right, wrong)))


def test_slurm_reads_every_line_for_it(slurm):
    """Catches an #SBATCH line behind the first command, which sbatch ignores without a word;
    and two Rays on one node."""
    lines = slurm.splitlines()
    first_command = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [k for k, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert asked
    assert max(asked) < first_command
    assert any(lines[k].split()[1] == "--ntasks-per-node=1" for k in asked)
    assert any(lines[k].split()[1] == "--exclusive" for k in asked)


def test_the_page_names_files_that_exist():
    """Catches a page that was left behind when a file moved."""
    named = set(re.findall(r"(?<![\w./-])(?:jobs|tests|docs)/[\w./-]*\w", (ROOT / "docs" / "cluster.md").read_text()))
    assert {"jobs/cluster/onprem.yaml", "jobs/cluster/rayjob.yaml", "jobs/cluster/slurm.sh"} <= named
    assert not sorted(name for name in named if not (ROOT / name).exists())
