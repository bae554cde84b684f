"""The command line as a shell sees it: statuses, sentences, and nothing that a terminal would obey."""

import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mmkt_ray import cli, failures
from mmkt_ray.cli import main
from mmkt_ray.config import Config
from mmkt_ray.errors import DataError, UserError
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_card import CARD, Card
from mmkt_ray.record import write_sealed
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from mmkt_ray.steps import check_test
from mmkt_ray.terminal import plain
from tests.heads import free_port
from tests.manifests import make_manifest

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x7f\rx"


def no_obeyed(text: str) -> bool:
    """No character that Unicode counts as a control or format character, but line feed and tab."""
    return not [c for c in text if (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")) or c in "\u202e\u2066"]


@pytest.mark.slow
def test_control_characters_of_an_error_are_spelled_out_in_a_program_too() -> None:
    """Catches a class or file whose name moves the cursor in the traceback of a script that calls `mmkt_ray.load`."""
    assert str(DataError(f"no '{EVIL}'")).startswith(r"no '\x1b]0;owned\x07")


def test_control_characters_are_spelled_out(tmp_path: Path) -> None:
    """Catches a file's name, a config's value or a library's error that clears the screen or writes into the
    terminal."""
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    (folder / "c.yaml").write_text(yaml.safe_dump({"name": EVIL, EVIL: 1}))
    for words in (["config", str(folder / "c.yaml")], ["config", f"{folder}/none.yaml"], ["config", EVIL, EVIL]):
        done = subprocess.run([sys.executable, "-m", "mmkt_ray.cli", *words], capture_output=True, timeout=60)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == 2
        assert r"\x1b]0;owned\x07" in said
        assert no_obeyed(said)


def test_text_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    """Catches UnicodeEncodeError in place of the message, for bytes that are no text and for a terminal without
    UTF-8."""
    path = os.fsencode(tmp_path) + b"/\xff\xe9\xc3\xa9.yaml"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mmkt_ray.cli", "config", path]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert rb"\udcff\udce9\xe9.yaml" in done.stderr


def test_plain_text_stays() -> None:
    """Catches text of other languages, emoji or lines that are spelled out too."""
    text = "Größe 写真 👩\u200d🚀 é e\u0301 שלום\tx\n"
    assert plain(text) == text
    assert no_obeyed(plain("".join(map(chr, range(0x3000))) + "\udcff"))


def test_a_fault_of_ours_is_a_traceback_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a fault that looks like the user's, or control characters in a traceback."""
    monkeypatch.setattr(cli, "_run", lambda _: 1 // int(EVIL[:0] or 0))
    assert main(["config"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err

    def fail(_: object) -> int:
        raise KeyError(EVIL)

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["config"]) == 1
    assert no_obeyed(capsys.readouterr().err)


@pytest.mark.parametrize("seeds", ["0", "-1", "x", "1.5", "9" * 5000])
def test_no_seeds_are_refused(capsys: pytest.CaptureFixture[str], seeds: str) -> None:
    """Catches a repetition of nothing that is told as a result."""
    with pytest.raises(SystemExit) as ended:
        main(["repeat", "c.yaml", f"--seeds={seeds}"])
    assert ended.value.code == 2
    assert "must be a whole number of 1 or more" in capsys.readouterr().err


def test_an_object_store_that_does_not_answer(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a traceback of pyarrow's where nobody listens."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        **{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"},
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mmkt_ray.s3.S3_ATTEMPTS", 1)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    assert main(["report", str(path), "--set", "run_root=s3://bucket/runs?".rstrip("?")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mmkt: ")
    assert "Traceback" not in said


def test_a_read_only_folder(tmp_path: Path, make_config: Callable[..., Config], capsys) -> None:
    """Catches a traceback where a report may not be written;
    root may write everywhere, so the folder is a file here."""
    config = make_config()
    run = Path(config.run_root, config.name)
    run.parent.mkdir(parents=True)
    run.write_text("")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["report", str(path)]) == 2
    assert capsys.readouterr().err.startswith("mmkt: ")


def test_a_card_without_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `KeyError: 'config'` for a card that somebody has edited."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    for card in ({"spec": {}, "class_names": {}, "encoders": {}}, {}):
        write_sealed(str(tmp_path / CARD), {"schema_version": Card.schema_version, "checksums": {}, **card})
        assert main(["predict", str(tmp_path), "x.parquet", "--out", str(tmp_path / "out")]) == 2
        assert "train again" in capsys.readouterr().err


def test_errors_of_files_are_the_users() -> None:
    """Catches a full disk or a missing right that ends in a traceback,
    and a bug of ours that is told as one of these."""
    assert isinstance(failures.find_user_error(PermissionError(13, "Permission denied", "/x")), UserError)
    assert failures.find_user_error(KeyError("x")) is None


def test_a_label_of_5000_digits_is_a_label(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """Catches a number that Python refuses to make taken for damaged JSON."""
    digits = "7" * 5000
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(f'{{"text": "x", "colour": {digits}}}\n{{"text": "y", "colour": 17}}\n')
    source = {"reader": "manifest", "path": "a.jsonl", "columns": {"text": "text", "colour": "colour"}}
    config = make_config(
        samples__sources=[source | {"columns": {**source["columns"], "image": "none"}, "absent": "null"}]
    )
    (chunk,) = read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0])
    assert chunk.table["colour"].to_pylist() == [digits, "17"]


def test_no_test_split_is_told_before_training() -> None:
    """Catches hours of training whose comparison then fails for want of a row."""
    counts = {"train": {"train": 3}, "whole": {"train": 3, "test": 1}}
    labels = {"thing": {"test": {"a": 1}}}
    stores = {n: Store(n, make_manifest({"by_split": found, "by_task": labels})) for n, found in counts.items()}
    check_test({"a": stores["whole"]})
    with pytest.raises(DataError, match=r"no sample is in the test split.*test_frac"):
        check_test(stores)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu", "x.yaml"], "no command 'rnu': did you mean 'run'?"),
        (["config", "{folder}"], "is no readable YAML file"),
        (["run", "{folder}"], "is no readable YAML file"),
        (["predict", "{folder}", "--out", "x"], "is no finished model folder"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """Catches a traceback, or a list of 15 commands, for a slip."""
    assert main([word.format(folder=tmp_path) for word in words]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that does nothing."""
    assert main(["config", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    """Catches a traceback, or `Exception ignored`, where the reader of the output has enough:
    mmkt config | head -1."""
    command = f"{sys.executable} -m mmkt_ray config | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "141\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script that a shell refuses, or that lacks a command or its options."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "predict" in script
    assert "trust-code" in script
    if shell == "bash":
        asked = f"{script}\nCOMP_WORDS=(mmkt predict --tru); COMP_CWORD=2; _mmkt; echo \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ("--trust-code\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve", "m", "--port", "99999"], "from 0 to 65535"),
        (["serve", "m", "--port", "-1"], "from 0 to 65535"),
        (["predict", "m", "a.csv", "--out", ""], "must not be empty"),
        (["predict", "m", "a.csv", "--out", "o", "--column", "text="], "takes OURS=THEIRS"),
        (["predict", "m", "a.csv", "--out", "o", "--column", "text"], "takes OURS=THEIRS"),
        (["compare", "a.csv", "a.csv/"], "holds no evaluated model"),
        (["predict", "a.csv", "a.csv", "--out", "o"], "is a file: name the folder"),
    ],
)
def test_odd_words_are_told(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], words: list, told: str
) -> None:
    """Catches a traceback for a port or a column's name, and results that are written into the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text\na\n")
    try:
        status = main(words)
    except SystemExit as ended:  # of argparse
        status = ended.code
    assert (status, told in capsys.readouterr().err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) in (["a.csv"], ["a.csv", "o"])
