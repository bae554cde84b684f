"""Each thing that stops a run is found before the run, by its own line."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmkt_ray import __version__, doctor
from mmkt_ray.cli import main
from mmkt_ray.cluster import Resources
from mmkt_ray.config import Config
from mmkt_ray.doctor import (
    Finding,
    check_before_work,
    check_resources,
    examine,
    judge_node,
    look_at_columns,
    own_versions,
    quick_findings,
    refuse,
)
from mmkt_ray.done import run_folder
from mmkt_ray.errors import DataError, ResourceError
from tests.heads import RAY, head, running, wait_until
from tests.shapes import png, write_shard

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("shapes")
MakeConfig = Callable[..., Config]


def problems(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if not finding.ok]


def test_a_sound_config_passes_and_counts_its_rows(make_config: MakeConfig) -> None:
    """Catches a preflight that cries wolf, or leaves its probe behind; an estimate of rows from one shard alone."""
    config = make_config()
    findings = quick_findings(config, run_folder(config))
    assert problems(findings) == []
    assert "3 shards, about 120 rows" in str(findings[0])
    assert list(Path(run_folder(config)).iterdir()) == []
    refuse(findings)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"samples__sources__0__path": "shape/*.parquet"}, "did you mean 'shapes'"),
        ({"samples__sources__0__columns__text": "captoin"}, "did you mean 'caption'"),
        ({"samples__sources__0__columns__image": "caption"}, "image must be encoded bytes"),
        ({"modalities__text__encoder": "nowhere:Class"}, "cannot build encoder 'nowhere:Class'"),
        ({"modalities__text__encoder": {"name": "huggingface", "folder": "/nowhere"}}, "no config.json in '/nowhere'"),
        ({"variants": {"a": {"modalities.text.encoder": "nowhere:Class"}}}, "cannot build encoder 'nowhere:Class'"),
        ({"run_root": "/proc/nowhere"}, "cannot write to '/proc/nowhere"),
    ],
)
def test_each_fault_is_told(make_config: MakeConfig, overrides: dict, complaint: str) -> None:
    """Catches what used to be told after the encoders were fitted, or by a traceback on a node."""
    config = make_config(**overrides)
    found = problems(quick_findings(config, run_folder(config)))
    assert len(found) == 1, found
    assert complaint in found[0]
    with pytest.raises(DataError, match="nothing was done yet"):
        check_before_work(config, run_folder(config), trains=True)


def test_one_fault_does_not_hide_the_next(make_config: MakeConfig) -> None:
    """Catches a preflight that has to be run once for each mistake, and a source called by another's number."""
    sources = make_config().model_dump(mode="json")["samples"]["sources"]
    broken = [
        sources[0] | {"path": "nowhere"},
        sources[0],
        sources[0] | {"columns": {"image": "image", "colour": "color"}},
    ]
    config = make_config(samples__sources=broken, modalities__text__encoder="nowhere:Class")
    found = problems(quick_findings(config, run_folder(config)))
    assert [line.split()[1:3] for line in found] == [["source", "0"], ["source", "2"], ["encoder", "text:"]]
    assert "samples.sources[0].path" in found[0]
    assert "samples.sources[2].columns" in found[1]


def test_a_column_that_is_always_null_is_pointed_out(make_config: MakeConfig, tmp_path: Path) -> None:
    """Catches a misspelt tar suffix, which is a null and no error, told only after all was encoded."""
    write_shard(tmp_path / "data" / "shapes" / "0.parquet", 0, 40, caption=[None] * 40)
    config = make_config()
    findings = quick_findings(config, run_folder(config))
    assert problems(findings) == []
    assert "no text in the first 16: is the name right?" in str(findings[0])


def test_rows_that_will_be_rejected_stop_no_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Catches a run that is refused for one damaged or empty file, which it would leave out;
    one that is not told of."""
    shards = sorted((tmp_path / "data" / "shapes").iterdir())
    shards[0].write_bytes(b"PAR1 this is no parquet")
    write_shard(shards[1], 0, 0)
    config = make_config()
    findings = quick_findings(config, run_folder(config))
    assert problems(findings) == []
    assert "3 shards" in str(findings[0])
    for shard in shards:
        write_shard(shard, 0, 4, image=[b"broken"] * 4, caption=[None] * 4)
    shards[0].write_bytes(b"PAR1 this is no parquet")
    findings = quick_findings(config, run_folder(config))
    refuse(findings)
    for shard in shards:
        shard.write_bytes(b"PAR1 this is no parquet")
    findings = quick_findings(config, run_folder(config))
    assert "no sample in the first rows" in problems(findings)[0]
    refuse(findings)


def test_rows_of_which_most_would_be_rejected_stop_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Catches encoders fitted for hours before a run finds split names that it does not know,
    or files that are not there."""
    for shard in (tmp_path / "data" / "shapes").iterdir():
        write_shard(shard, 0, 20, image=[b"x"] * 20)
    config = make_config(samples__sources__0__columns__split="colour", samples__sources__0__split=None)
    with pytest.raises(DataError, match=r"nothing was done yet.*\n.*60 x unknown split '\w+': known: train"):
        refuse(quick_findings(config, run_folder(config)))
    lines = [json.dumps({"caption": "t", "file": f"{i}.png", "colour": "red"}) for i in range(20)]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    changes = {
        "reader": "manifest",
        "path": "a.jsonl",
        "columns": {"text": "caption", "image": "file", "colour": "colour"},
    }
    config = make_config(**{f"samples__sources__0__{key}": value for key, value in changes.items()})
    with pytest.raises(DataError, match=r"20 are rejected or lack a modality: 20 x image: no file '0.png'"):
        refuse(quick_findings(config, run_folder(config)))
    refuse(quick_findings(config.with_overrides({"samples.max_reject_frac": 1.0}), run_folder(config)))


def test_rows_behind_the_first_ones_are_looked_at(make_config: MakeConfig, tmp_path: Path) -> None:
    """Catches split names that are unknown, or files that are gone, from row 65 on, or in the last of many shards:
    told after hours of fitting."""
    shards = sorted((tmp_path / "data" / "shapes").iterdir())
    for start, (shard, split) in enumerate(zip(shards, ("train", "test", "holdout"), strict=True)):
        write_shard(shard, 40 * start, 40)
        table = pq.read_table(shard)
        pq.write_table(table.append_column("part", pa.array([split] * 40)), shard)
    columns = make_config().samples.sources[0].columns
    config = make_config(samples__sources__0__columns=columns | {"split": "part"})
    (wrong,) = problems(quick_findings(config, run_folder(config)))
    assert "split names of all 120 rows looked at: 40 will be rejected" in wrong
    assert "40 x unknown split 'holdout'" in wrong
    allowed = config.with_overrides({"samples.max_reject_frac": 0.5})
    assert problems(quick_findings(allowed, run_folder(allowed))) == []

    lines = [{"caption": "t", "file": "there.png" if i < 100 else f"{i}.png", "colour": "red"} for i in range(130)]
    (tmp_path / "data" / "there.png").write_bytes(png("red", 0))
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"reader": "manifest", "path": "a.jsonl"}
    source |= {"columns": {"text": "caption", "image": "file", "colour": "colour"}}
    config = make_config(samples__sources=[source])
    (wrong,) = problems(quick_findings(config, run_folder(config)))
    assert (
        "files of image of all 130 rows looked at: 30 will be rejected or lack a modality: 30 x image: no file" in wrong
    )
    for k in range(100, 125):
        (tmp_path / "data" / f"{k}.png").write_bytes(png("red", 0))
    (finding, *_) = quick_findings(config, run_folder(config))
    assert finding.ok
    assert "5 x image: no file '125.png'" in finding.text  # few enough, and told all the same


def test_a_look_at_all_rows_ends_in_time(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an hour of looking at a billion rows, and a part of them that is called all."""
    monkeypatch.setattr(doctor, "LOOK_S", -1.0)
    columns = make_config().samples.sources[0].columns
    config = make_config(samples__sources__0__columns=columns | {"split": "colour"})
    found = look_at_columns(config, 0, Finding("source 0", "sound"), 120)
    assert str(found).endswith("sound; split names of the first 0 rows looked at")


def test_a_disk_too_small_is_found(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is full after hours; a resumed run that is refused for what it has stored itself."""
    config = make_config()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    assert "choose another disk" in problems(quick_findings(config, run_folder(config)))[0]
    stored = Path(run_folder(config), "features", "x")
    stored.mkdir(parents=True)
    (stored / "part").write_bytes(bytes(10**6))
    assert problems(quick_findings(config, run_folder(config))) == []


def test_work_that_cannot_be_placed_is_found(make_config: MakeConfig) -> None:
    """Catches a pipeline or a training that would wait for ever."""
    assert "2 encoder actors" in check_resources(make_config(extract__num_actors=2), Resources(4, 0))
    with pytest.raises(ResourceError, match="at most 3"):
        check_resources(make_config(extract__num_actors=4), Resources(4, 0))
    with pytest.raises(ResourceError, match="GPUs, the cluster has 0"):
        check_resources(make_config(extract__num_gpus=1), Resources(4, 0))
    with pytest.raises(ResourceError, match=r"num_workers is 4.* at most 3"):
        check_resources(make_config(variants={"a": {"training.num_workers": 4}}), Resources(4, 0))


@pytest.mark.usefixtures("ray_local")
def test_every_node_is_asked(make_config: MakeConfig) -> None:
    """Catches a probe that stays in the run folder, and checks that no node runs."""
    config = make_config()
    findings = examine(config, run_folder(config))
    assert problems(findings) == []
    assert "shares the run folder" in str(findings[-1])
    assert str(findings[-1]).startswith("ok       node 1 of 1")
    assert list(Path(run_folder(config)).iterdir()) == []
    wrong = examine(make_config(samples__sources__0__path="nowhere"), run_folder(config))
    assert "not asked" in problems(wrong)[-1]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_node_that_differs_is_found(make_config: MakeConfig, tmp_path: Path) -> None:
    """Catches features that are written to a node's own disk, where no other node and no resumed run finds them; a
    node with another version, whose features or gradients differ; and a run that starts all the same."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a node with another disk takes a mount namespace, which takes root")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config(extract__num_actors=2).model_dump(mode="json")))
    (tmp_path / "runs").mkdir()
    with head() as cluster:
        join = f"{RAY} start --address {cluster.address} --node-ip-address 127.0.0.2 --num-cpus 1 --block"
        hide = f"mount -t tmpfs none {tmp_path / 'runs'}"
        own = {"RAY_TMPDIR": cluster.scratch, "PYTHONPATH": install_others(tmp_path / "others")}
        with running(["unshare", "-m", "sh", "-c", f"{hide} && exec {join}"], **own):
            wait_until(lambda: num_nodes(cluster.jobs) == 2)
            found = mmkt("doctor", path, cluster.address)
            refused = mmkt("extract", path, cluster.address)
    assert found.returncode == 1, found.stderr
    nodes = [line for line in found.stdout.splitlines() if " node " in line]
    assert sorted(line.split()[0] for line in nodes) == ["ok", "problem"], found.stdout
    (problem,) = [line for line in nodes if line.startswith("problem")]
    assert "mmkt_ray 0.0.1, this process has" in problem
    assert "torch 1.0, this process has" in problem
    assert "does not share" in problem
    assert refused.returncode == 2, refused.stderr
    assert "nothing was done yet" in refused.stderr
    assert problem.removeprefix("problem").strip() in refused.stderr
    assert not list((tmp_path / "runs" / "shapes").glob("features/*"))


def install_others(folder: Path) -> str:
    """Another version of this package, and what tells of another torch, for a node's PYTHONPATH."""
    package = shutil.copytree(ROOT / "mmkt_ray", folder / "mmkt_ray", ignore=shutil.ignore_patterns("__pycache__"))
    version = package / "__init__.py"
    version.write_text(version.read_text().replace(__version__, "0.0.1"))
    (folder / "torch-1.0.dist-info").mkdir()
    (folder / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    return str(folder)


def mmkt(command: str, config: Path, address: str) -> subprocess.CompletedProcess[str]:
    """The command on the cluster at that address, from a folder without code:
    workers get that of the driver's folder."""
    words = [sys.executable, "-m", "mmkt_ray.cli", command, str(config)]
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=config.parent, env=environment, capture_output=True, text=True, timeout=240)


def num_nodes(jobs: str) -> int:
    with urllib.request.urlopen(f"{jobs}/nodes?view=summary", timeout=5) as answer:
        summary = json.load(answer)["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


def test_what_a_node_says_is_judged() -> None:
    """Catches other versions on a node, a folder that is shared in one direction only, a node that is silent."""
    here = own_versions()
    sound = {"versions": here, "sees": True, "wrong": []}
    assert judge_node("n", here, sound, True, "/r").ok
    for answer, wrote, complaint in [
        (sound | {"versions": here | {"torch": "1.0"}}, True, "torch 1.0, this process has"),
        (sound | {"sees": False}, False, "does not share '/r'"),
        (sound, False, "does not share '/r'"),
        (sound | {"wrong": ["encoder text: pip install x"]}, True, "pip install x"),
        ("no answer in 1 s", False, "no answer"),
    ]:
        finding = judge_node("n", here, answer, wrote, "/r")
        assert not finding.ok
        assert complaint in finding.text


def test_exit_status_and_one_line_each(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a 0 that lets a script go on to rent machines."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    assert main(["doctor", str(path), "--set", "samples.sources.0.path=nowhere"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["problem", "ok", "ok", "ok", "problem"]
