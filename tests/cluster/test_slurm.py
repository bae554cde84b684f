"""The lines of docs/cluster.md for Slurm, given to a real Slurm of one node: munged, slurmctld and slurmd.

They run in namespaces of their own, because Ray's `symmetric-run` wants a node without another Ray, and because the
end of the namespace ends whatever is left. `make test-deploy` runs it, as root, with Debian's packages slurmctld,
slurmd, slurm-client, munge and iproute2.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.pages import ROOT, shell_commands, text
from tests.shapes import shapes_config, write_shards

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "ip", "unshare")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="namespaces take root"),
    pytest.mark.skipif(not all(shutil.which(p, path=PATH) for p in PROGRAMS), reason="no Slurm on this machine"),
]
CONF = """
ClusterName=here
SlurmctldHost=localhost
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
NodeName=localhost CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES
"""
# Inside of the namespaces. The documented lines come in as $SBATCH and $SCANCEL.
NODE = """
set -eu
hostname localhost
ip link set lo up
ip link add eth0 type veth peer name eth1
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up
cd "$FOLDER"
munged --foreground --force --key-file=munge/key --socket="$FOLDER/munge/socket" --pid-file="$FOLDER/munge/pid" \
    --log-file="$FOLDER/munge/log" --seed-file="$FOLDER/munge/seed" &
until [ -S munge/socket ]; do sleep 0.1; done
slurmctld -D -i &
slurmd -D -N localhost &
until sinfo --noheader --format %t | grep -q idle; do sleep 0.2; done
gone() { until [ -z "$(squeue --noheader)" ]; do sleep 0.2; done; }
cd "$FOLDER/site"
eval "$SBATCH"
gone
scontrol show job 1 > job1.txt
eval "$SBATCH --set name=cancelled"
until pgrep raylet > /dev/null; do sleep 0.2; done
pgrep --list-name 'raylet|gcs_server' > rays-before.txt
eval "${SCANCEL/JOBID/2}"
gone
scontrol show job 2 > job2.txt
for _ in $(seq 150); do pgrep --list-name 'raylet|gcs_server|^ray::' > rays-after.txt || break; sleep 0.2; done
eval "$SBATCH --set training.lrr=1"
gone
scontrol show job 3 > job3.txt
"""


def test_the_documented_lines_run_a_job_and_end_one(tmp_path: Path) -> None:
    """Catches a script that Slurm, srun or Ray does not take, a job whose status is not the run's, a run without
    results, and a cancelled job that leaves its Ray behind."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "jobs", site / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (site / ".venv").symlink_to(ROOT / ".venv")
    script = site / "jobs" / "cluster" / "slurm.sh"
    lines = script.read_text().splitlines()
    adapted = {"--nodes": "1", "--cpus-per-task": "2", "--gpus-per-node": "0"}  # to the site, as the page says
    for i, line in enumerate(lines):
        option = line.removeprefix("#SBATCH ").partition("=")[0]
        if line.startswith("#SBATCH") and option in adapted:
            lines[i] = f"#SBATCH {option}={adapted[option]}"
    script.write_text("\n".join(lines) + "\n")
    write_shards(site)
    config = shapes_config(site, evaluation={"studies": []}).model_dump(mode="json")
    (site / "jobs" / "configs" / "openmoji.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name, mode in (("munge", 0o700), ("state", 0o755), ("spool", 0o755)):
        (tmp_path / name).mkdir(mode=mode)
    (tmp_path / "munge" / "key").write_bytes(os.urandom(128))
    (tmp_path / "munge" / "key").chmod(0o400)
    (tmp_path / "slurm.conf").write_text(CONF.format(folder=tmp_path))
    documented = [words for words in shell_commands(text("docs/cluster.md")) if words[0] in ("sbatch", "scancel")]
    sbatch, scancel = (" ".join(words) for words in documented)
    given = {"FOLDER": str(tmp_path), "SBATCH": sbatch, "SCANCEL": scancel, "SLURM_CONF": f"{tmp_path}/slurm.conf"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    limit = ["timeout", "--kill-after=5", "230"]  # ends the namespaces also where pytest is gone
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts"]
    with (tmp_path / "node.log").open("w") as out:
        done = subprocess.run(
            [*limit, *apart, "bash", "-c", NODE],
            env={**kept, **given, "PATH": PATH},
            stdout=out,
            stderr=out,
            timeout=240,
            check=False,
        )
    logs = {p.name: p.read_text()[-3000:] for p in (tmp_path / "node.log", *site.glob("mmkt-*.log"))}
    assert done.returncode == 0, logs
    assert "JobState=COMPLETED" in (site / "job1.txt").read_text(), logs
    assert "ExitCode=0:0" in (site / "job1.txt").read_text()
    assert list(site.glob("runs/*/report/results.json")), logs
    assert "mmkt predict" in (site / "mmkt-1.log").read_text()  # what `tail -f` ends with
    assert "JobState=CANCELLED" in (site / "job2.txt").read_text()
    assert (site / "rays-before.txt").read_text().split()
    assert not (site / "rays-after.txt").read_text().split()
    assert "JobState=FAILED" in (site / "job3.txt").read_text(), logs
    assert "ExitCode=0:0" not in (site / "job3.txt").read_text()
    assert "training.lrr" in (site / "mmkt-3.log").read_text()
