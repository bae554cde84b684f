"""The config: what it accepts, what it refuses and with which words."""

from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mmkt_ray.cli import main
from mmkt_ray.config import (
    SCHEME_NAMES,
    Config,
    describe_fields,
    fingerprint,
    load_config,
    parse_config,
    parse_override,
)
from mmkt_ray.errors import ConfigError
from tests.configs import raw_config

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))


@pytest.fixture
def raw() -> dict[str, Any]:
    return raw_config({"label": "multiclass"}, {"image": "img", "text": "txt", "label": "label"}, "x/*.parquet")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    """A key renamed in the code but not in a shipped config, or a variant that could not be built."""
    config = load_config(path)
    assert config.expand_variants().keys() == (config.variants.keys() or {"model"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"trainin": 1}, ["unknown key 'trainin'", "did you mean 'training'"]),
        ({"training.epoch": 1}, ["did you mean 'epochs'"]),
        ({"modalities.image.encoder.image_sise": 32}, ["did you mean 'image_size'"]),
        ({"modalities.text.encoder": "tfid"}, ["unknown encoder 'tfid'", "did you mean 'tfidf'"]),
        ({"model.sharing": "taks"}, ["did you mean 'task'", *SCHEME_NAMES]),
        ({"model.fusion": "conca"}, ["unknown fusion 'conca'", "did you mean 'concat'"]),
        ({"model.fusion": {"name": "concat", "depth": 3}}, ["depth means nothing to concat fusion"]),
        ({"model.sharing": ["task", "modality"]}, ["names 2 levels but num_levels is 1"]),
        ({"model.modalities": ["imgae"]}, ["did you mean 'image'"]),
        ({"training.epochs": "many"}, ["training.epochs", "got 'many'"]),
        ({"training.lr": -1}, ["training.lr", "greater than 0"]),
        ({"samples.combine": "uni"}, ["unknown name 'uni'", "'union', 'join', 'pair'"]),
        ({"samples.combine": {"name": "pair", "labels": {"image": "label", "txt": "label"}}}, ["did you mean 'text'"]),
        ({"samples.split": {"val_frac": 0.5, "test_frac": 0.5}}, ["nothing is left to train on"]),
        ({"samples.sources.0.columns": {"imag": "img"}}, ["fills column 'imag'", "did you mean 'image'"]),
        ({"samples.sources.0.columns": {"image": "img", "label": "y"}}, ["no source fills 'text'"]),
        ({"modalities.image.encoder": {"name": "cnn", "pretrain": "lable"}}, ["did you mean 'label'"]),
        ({"modalities.text.encoder": "pixels"}, ["reads image", "kind is text"]),
        ({"modalities.image.reduce": "pca"}, ["'modalities.image.reduce.pca.dim' is missing"]),
        ({"name": "a/b"}, ["name", "letters"]),
        ({"variants": {"../../../x": {}}}, ["variants.../../../x: a name consists of letters"]),
        ({"variants": {"majority": {}}}, ["variants: majority is the name of a model that a run makes by itself"]),
        (
            {"tasks": {"image_hash": {}}},
            ["'image_hash' belongs to 'image_hash' of modalities or tasks and to modality 'image'"],
        ),
        ({"tasks": {"a": {}, "a_pred": {}}}, ["'a_pred' belongs to"]),
        ({"tasks": {"split": {}}}, ["'split' belongs to"]),
        (
            {"modalities.cam/front": {"kind": "image", "encoder": "pixels"}},
            ["modalities.cam/front: a name consists of"],
        ),
        ({"modalities...": {"kind": "image", "encoder": "pixels"}}, ["a name consists of"]),
        ({"model.modalities": ["image", "image"]}, ["model.modalities: is there more than once: image"]),
        ({"model.tasks": ["label", "label"]}, ["model.tasks: is there more than once: label"]),
        ({"training.lr": float("inf")}, ["training.lr", "finite number", "got inf"]),
        ({"extract.num_gpus": 1.5}, ["extract", "a share of one GPU or a whole number, got 1.5"]),
        ({"training.weight_decay": float("nan")}, ["training.weight_decay", "finite number"]),
        ({"samples.sources.0.columns": {"image": False}}, ["got False", "yes or no; put the text in quotes"]),
        ({"run_root": date(2024, 11, 29)}, ["2024, 11, 29", "date; put the text in quotes"]),
        ({"name": 1}, ["name", "got 1", "number; put the text in quotes"]),
        ({"name": "x" * 101}, ["at most 100 characters"]),
        ({"tasks.label.kind": {"name": "regression", "los": "huber"}}, ["no option 'los'", "did you mean 'loss'"]),
        ({"seed": True}, ["seed: must be a number, which yes and no are not (got True)"]),
        ({"training.lr": True}, ["training.lr: must be a number"]),
        (
            {"modalities.text.encoder": {"name": "tfidf", "ngram_range": [1, True]}},
            ["tfidf.ngram_range.1: must be a number"],
        ),
        ({"samples.sources.0.limit": True}, ["samples.sources.0.limit: must be a number"]),
        ({"transfer.label_fracs": [0.1, True]}, ["transfer.label_fracs.1: must be a number"]),
        (
            {"search.space": {"training.lr": {"float": [False, 2]}}},
            ["search.space.training.lr.float.0: must be a number"],
        ),
        ({"variants": {"a": {"seed": True}}}, ["variants.a: seed: must be a number"]),
        ({"model.hidden_dim": 10**20}, ["model.hidden_dim"]),
        ({"training.epochs": 10**20}, ["training.epochs: must have at most 53 bits"]),
        *(({"training": empty}, ["training: must be a mapping of keys, got"]) for empty in ([], "", 0, False)),
        ({"model": []}, ["model: must be a mapping of keys, got []"]),
        ({"model.modalities": []}, ["model.modalities", "at least 1 item"]),
        ({"model.modalities": {"text": 1}}, ["model.modalities: must be a list, got"]),
        ({"samples.sources.0.columns.text": ""}, ["at least 1 character"]),
        ({"run_root": ""}, ["run_root", "at least 1 character"]),  # else the run lies in /
        ({"samples.sources.0.path": ""}, ["samples.sources.0.path", "at least 1 character"]),
        *(
            (
                {"samples.sources.0.encoding": name},
                ["samples.sources.0.encoding: unknown text encoding; usual ones: utf-8"],
            )
            for name in ("utf-99", "latin_one", "", "rot13", "base64", "a\0b")
        ),
        ({"variants": {"a": {"samples.sources.\u00b2.limit": 1}}}, ["is not inside a mapping or list"]),
    ],
)
def test_wrong_values_are_refused_with_a_hint(raw: dict[str, Any], override: dict[str, Any], words: list[str]) -> None:
    """A misspelt key that is silently ignored, or an error that does not say what is allowed."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw).with_overrides(override).expand_variants()
    for word in words:
        assert word in str(caught.value)


def test_all_faults_are_told_at_once(raw: dict[str, Any]) -> None:
    """Having to run again for each fault."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw | {"trainin": 1, "modell": 2})
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ConfigError) as caught:  # pydantic counts a list without its faulty items: "at least 1 item"
        parse_config(raw).with_overrides({"samples.sources.0.limit": 1.5})
    assert len(str(caught.value).splitlines()) == 1


def test_bare_names_and_mappings_are_the_same(raw: dict[str, Any]) -> None:
    """`fusion: concat` meaning something else than `fusion: {name: concat}`."""
    config = parse_config(raw)
    assert config.with_overrides({"model.fusion": "decision"}) == config.with_overrides(
        {"model.fusion": {"name": "decision"}}
    )
    assert (
        config.with_overrides({"modalities.image.encoder.image_size": 16}).modalities["image"].encoder.image_size == 16
    )


def test_config_is_frozen(raw: dict[str, Any]) -> None:
    """A stage changing the config under the feet of the next one."""
    with pytest.raises(ValidationError):
        parse_config(raw).training.epochs = 3  # type: ignore[misc]


def test_saved_config_reads_back_equal(raw: dict[str, Any]) -> None:
    """A config saved with an output that cannot rebuild the run."""
    config = parse_config(raw).with_overrides({"samples.combine": "join", "model.sharing": ["modality"]})
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_variants_override_and_are_checked_on_load(raw: dict[str, Any], tmp_path: Path) -> None:
    """A misspelt variant found only after an hour of extraction."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw | {"variants": {"a": {"model.fusion": "decision"}, "b": {"training.lr": 0.5}}}))
    variants = load_config(path).expand_variants()
    assert variants["a"].model.fusion.name == "decision"
    assert (variants["b"].training.lr, variants["b"].model.fusion.name) == (0.5, "concat")
    path.write_text(yaml.safe_dump(raw | {"variants": {"a": {"model.fusio": "decision"}}}))
    with pytest.raises(ConfigError, match="did you mean 'fusion'"):
        load_config(path)


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    """A traceback in place of a sentence."""
    with pytest.raises(ConfigError, match="no config at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "'name' is there twice"),
        ("variants:\n  a: {training.lr: 0.1}\n  a: {training.lr: 0.2}\n", "'a' is there twice"),
        ("[" * 20_000, "nested too deeply"),
        ("- " * 20_000, "nested too deeply"),
        ("seed: " + "1" * 5000, "not valid YAML"),
        ("run_root: 2024-02-30", "not valid YAML"),
        ("a: &a [*a]", "levels"),
        ("a: &a [1]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefghi")), "values"),
        ("seed: !!bool x", "tag"),
        ("seed: !!timestamp x", "tag"),
        ('seed: !!int ""', "tag"),
        ("seed: !!map [1]", "tag"),
        ("seed: 010", "base 8: write it in base 10, or put the text in quotes"),
        ("seed: 1:30", "base 60"),
        ("seed: 1:30.5", "base 60"),
    ],
    ids=[
        *(
            "key",
            "variant",
            "brackets",
            "dashes",
            "digits",
            "date",
            "circle",
            "aliases",
            "bool",
            "time",
            "int",
            "map",
            "octal",
        ),
        *("base 60", "float 60"),
    ],
)
def test_yaml_that_would_mislead_or_blow_up(tmp_path: Path, text: str, words: str) -> None:
    """A variant that is dropped in silence because its name stands twice; 010 read as 8;
    a traceback or a full memory."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError) as caught:
        parse_override("variants={" + text.replace("\n", ", ") + "}")
    assert len(str(caught.value)) < 1000


def test_merged_keys_may_be_replaced(raw: dict[str, Any], tmp_path: Path) -> None:
    """`<<`, by which configs share what variants have in common, taken for a key that is there twice."""
    text = yaml.safe_dump(raw) + "variants:\n  a: &a {training.lr: 0.5, seed: 1}\n  b: {<<: *a, training.lr: 0.25}\n"
    (tmp_path / "c.yaml").write_text(text)
    variants = load_config(tmp_path / "c.yaml").expand_variants()
    assert [(v.training.lr, v.seed) for v in variants.values()] == [(0.5, 1), (0.25, 1)]


def test_names_that_yaml_would_type_are_text(raw: dict[str, Any], tmp_path: Path) -> None:
    """A variant called `no` that becomes False, and one called 2024-11-29 that becomes a date."""
    text = (
        yaml.safe_dump(raw) + "variants:\n  no: {seed: 1}\n  2024-11-29: {seed: 2}\n  1: {seed: 3}\n  1.0: {seed: 4}\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    assert list(load_config(tmp_path / "c.yaml").expand_variants()) == ["no", "2024-11-29", "1", "1.0"]


@pytest.mark.parametrize("words", [["lr=["], ["training.lr=.inf"], ["name=" + "[" * 20_000], ["seed=" + "9" * 5000]])
def test_values_on_the_command_line_that_are_no_values(
    raw: dict[str, Any], tmp_path: Path, capsys, words: list[str]
) -> None:
    """A traceback in place of a sentence and exit status 2."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    assert main(["config", str(tmp_path / "c.yaml"), "--set", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mmkt: ")
    assert len(said) < 1000


def test_an_endless_file_and_an_empty_one_are_no_configs(tmp_path: Path) -> None:
    """All memory taken by a device or a file of data; "got NoneType" for an empty file;
    a key of any length shown in full."""
    with pytest.raises(ConfigError, match="more than 2,000,000 bytes"):
        load_config("/dev/zero")
    (tmp_path / "c.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="is empty"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(f'? "{"k" * 200_000}"\n: 1\n')
    with pytest.raises(ConfigError, match="unknown key 'kkk") as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 1000


def test_a_folder_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a folder's name in place of the file's in it."""
    assert main(["config", str(tmp_path)]) == 2
    assert "is no readable YAML file" in capsys.readouterr().err


def test_yaml_cannot_build_python_objects(tmp_path: Path) -> None:
    """Code run by opening a config."""
    (tmp_path / "evil.yaml").write_text("name: !!python/object/apply:os.system ['touch evil']")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "evil.yaml")


def test_override_parsing() -> None:
    """Numbers and lists of --set arriving as strings."""
    assert parse_override("a.b=[1, x]") == ("a.b", [1, "x"])
    assert parse_override("a=") == ("a", None)
    with pytest.raises(ConfigError, match="key=value"):
        parse_override("training.epochs")


def test_fingerprint_ignores_key_order_and_sees_values(raw: dict[str, Any]) -> None:
    """A rerun that recomputes because of key order, or one that reuses what was made otherwise."""
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(parse_config(raw)) != fingerprint(parse_config(raw | {"seed": 1}))


def test_every_field_is_described() -> None:
    """A key that `mmkt config` lists without saying what it means."""
    undocumented = [key for key, _, text in describe_fields() if not text and not key.endswith(".name")]
    assert not undocumented
    keys = {key for key, _, _ in describe_fields(Config)}
    assert {"training.lr", "samples.sources[].reader", "modalities.<name>.encoder(cnn).epochs"} <= keys
