"""Credentials and files that hold secrets go nowhere: not onto the terminal, not into a result, not to a cluster."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mmkt_ray import storage
from mmkt_ray.cli import main
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.upload import choose_files, packed

ROOT = Path(__file__).parents[1]
SECRET = "wJalrXUtnFEMI"
WITH_SECRETS = [
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/x",
    f"s3://AKIAEXAMPLE:{SECRET}/K7MDENG/bPx@bucket/x",
    f"s3://AKIAEXAMPLE:12/{SECRET}@bucket/x",
    f"gs://{SECRET}@bucket/x",
    f"gs://{SECRET}@bucket",
    f"http://user:{SECRET}@host:9000/x",
    f"s3://bucket/x?secret_key={SECRET}",
    f"https://host/x?a&X-Amz-Signature={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"s3://AKIAEXAMPLE%3A{SECRET}%40bucket/x",
    *(f"abfss://{SECRET}@account.dfs.core.windows.net/x", f"abfs://a:{SECRET}@account.dfs.core.windows.net"),
]
WITHOUT = [
    *("s3://bucket/a@b/x", "s3://a/b@c", "gs://a/b@c/d:e@f", "hdfs://host:8020/user/a@b"),
    *("s3://bucket/part-?.parquet", "s3://bucket/part#1.parquet", "s3://bucket/a%40b", "a:b@c", "gs://b/t=1/x.parquet"),
    "abfss://container-1@account.dfs.core.windows.net/x",
    *("task-sk-learn-with-a-very-long-name-indeed", "runs/hf_model", "token=1/password=2", "AKIA", "runs/eyJ.x"),
]


@pytest.mark.parametrize("uri", WITH_SECRETS)
@pytest.mark.parametrize("place", ["--set", "config", "argument"])
def test_credentials_are_refused_and_not_shown(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str, place: str
) -> None:
    """Catches keys that are printed by an error, by `mmkt config` or by argparse,
    or travel to the cluster in an entrypoint."""
    raw = make_config().model_dump(mode="json") | ({"run_root": uri} if place == "config" else {})
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    words = {"--set": ["--set", f"run_root={uri}"], "config": [], "argument": [uri]}[place]
    for command in (["config"], ["submit", "--address", "http://127.0.0.1:1"]):
        assert main([command[0], str(path), *command[1:], *words]) == 2
        said = "".join(capsys.readouterr())
        assert SECRET not in said
        assert "has settings or keys in it" in said
    with pytest.raises(DataError, match="settings or keys"):
        storage.resolve(uri)


TOKENS = [
    *(
        "hf_" + SECRET * 3,
        "ghp_" + SECRET * 3,
        "github_pat_" + SECRET * 3,
        "sk-" + (SECRET + "7") * 3,
        "glpat-" + SECRET * 2,
    ),
    *(
        "xoxb-1234-" + SECRET,
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{SECRET}.x",
        f"Server=x;Password={SECRET}",
        f"host=db password={SECRET}",
    ),
    *(f"AccountKey={SECRET}==", f"https://h/x;token={SECRET}", f"-----BEGIN RSA PRIVATE KEY-----{SECRET}"),
]


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_and_passwords_are_refused_and_not_shown(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], token: str
) -> None:
    """Catches a token as a value of a config, or in a line that YAML can't read,
    that is printed or travels to a cluster."""
    raw = make_config().model_dump(mode="json")
    path = tmp_path / "c.yaml"
    for text, told in (
        (yaml.safe_dump(raw | {"run_root": token}), "put it into the environment"),
        (f"run_root: '{token}'\nname: [{token}\n", "it is not shown"),
    ):
        path.write_text(text)
        assert main(["submit", str(path), "--address", "http://127.0.0.1:1"]) == 2
        said = "".join(capsys.readouterr())
        assert told in said
        assert SECRET not in said


@pytest.mark.parametrize("uri", WITHOUT)
def test_what_only_looks_like_credentials_is_accepted(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str
) -> None:
    """Catches a bucket's folder with an @, a port, or a pattern with a ? that is refused."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    assert main(["config", str(path), "--set", f"data_root={uri}"]) == 0
    assert uri in capsys.readouterr().out


SECRETS = [
    *(".env", ".env.local", "prod.env", ".netrc", ".pypirc", ".aws/credentials", ".ssh/id_ed25519", "keys/id_rsa"),
    *("server.pem", "server.key", ".ray/auth_token", "jobs/token", "gcp-service-account.json", "notes.txt", "mine"),
    *(".streamlit/secrets.toml", "accessKeys.csv", "openai_api_key.txt", "passwords.txt", "terraform.tfstate"),
    *(".bash_history", "kaggle.json", ".config/gh/hosts.yml", ".pip/pip.conf", "server.key.bak"),
]
SENT = [
    *(
        "c.yaml",
        "keys.py",
        "environment.yml",
        "env.yml",
        "api.json",
        "history.md",
        "jobs/run.py",
        "mmkt_ray/credentials.py",
    ),
    *("token.py", "tokenizer.json", ".gitignore", "linked.py"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with code, secrets, what git ignores, and links that lead out of it or round in a circle."""
    root = tmp_path / "project"
    for name in (*SECRETS, *SENT[:-1], "ignored/x", "data/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"contents of {name}")
    (root / "notes.txt").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n")
    (root / ".gitignore").write_text("/ignored/\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "passwords").write_text("secret")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "out.txt").symlink_to(tmp_path / "outside" / "passwords")
    (root / "jobs" / "round").symlink_to(root)
    (root / "linked.py").symlink_to(root / "jobs" / "run.py")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(root / "mine"))
    return root


def test_secrets_and_links_out_of_the_folder_stay(folder: Path) -> None:
    """Catches passwords and keys that a job's copy of the folder carries to every node; code left out by its name."""
    upload = choose_files(folder, ["/data/"])
    with packed(upload) as package:
        assert (package.parent.stat().st_mode & 0o777) == 0o700
        listed = subprocess.run(
            [sys.executable, "-m", "zipfile", "-e", str(package), str(folder.parent / "there")], check=True
        )
        assert zipfile.ZipFile(package).testzip() is None
    assert listed.returncode == 0
    there = folder.parent / "there"
    assert sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()) == sorted(SENT)
    assert (there / "linked.py").read_bytes() == (folder / "jobs" / "run.py").read_bytes()
    assert not package.parent.exists()
    assert {".env", ".aws", "out", "out.txt", "notes.txt", "mine", "jobs/round"} <= set(upload.kept_back)
    assert f"uploads {len(SENT)} files" in str(upload)


def test_the_zip_is_gone_after_a_failure(folder: Path) -> None:
    """Catches a copy of the project that stays in /tmp when the upload breaks off."""
    left: list[Path] = []

    def fails() -> None:
        with packed(choose_files(folder, [])) as package:
            left.append(package.parent)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not left[0].exists()


def test_a_folder_that_is_too_large_is_refused(folder: Path) -> None:
    """Catches a data set that travels with the code because nobody named it in .rayignore."""
    with open(folder / "corpus.bin", "wb") as file:
        file.truncate(150_000_000)
    with pytest.raises(ConfigError, match=r"has 150\.0 MB to upload.*corpus\.bin \(150\.0 MB\).*\.rayignore"):
        choose_files(folder, [])
    assert "corpus.bin" not in choose_files(folder, ["corpus.bin"]).sizes


def test_the_same_files_are_the_same_package(folder: Path) -> None:
    """Catches an upload that is repeated for each submission of the same folder."""
    found = []
    for _ in range(2):
        with packed(choose_files(folder, [])) as package:
            found.append(package.read_bytes())
        os.utime(folder / "c.yaml", (1e9, 1e9))
    assert found[0] == found[1]
