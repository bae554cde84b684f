"""The model of time and cost: its arithmetic by hand, its rates from a run that was really made."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmkt_ray import steps
from mmkt_ray.cli import main
from mmkt_ray.config import Config, load_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.plan import (
    Machines,
    PlannedStep,
    extract_steps,
    find_limits,
    fit_steps,
    mean_epochs,
    plan,
    reduce_steps,
    train_steps,
)
from mmkt_ray.plan import rates as known
from mmkt_ray.plan.rates import Rates, rates_of, stored_bytes, widths

MakeConfig = Callable[..., Config]
CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
RATES = Rates(
    {"read": 1e-3, "decode": 1e-3, "encode image": 5e-3, "encode text": 2e-3, "write": 1e-3},
    reduce=2e-3,
    train={"model": 1e-4},
    train_frac=0.5,
    store_bytes=100,
    source="by hand",
)


def all_steps(config: Config, rates: Rates, machines: Machines, samples: float) -> list[PlannedStep]:
    parts = (fit_steps, extract_steps, reduce_steps, train_steps)
    return [step for part in parts for step in part(config, rates, machines, samples)]


def named(found: list[PlannedStep], name: str) -> PlannedStep:
    return next(step for step in found if step.name == name)


def test_arithmetic_by_hand(make_config: MakeConfig) -> None:
    """Catches a step that is counted twice, shared where it is not, or measured in other units."""
    reduce = {"name": "pca", "dim": 8}
    config = make_config(extract__num_actors=10, extract__chunk_rows=1000, modalities__image__reduce=reduce)
    found = all_steps(config, RATES, Machines(nodes=2, cpus=8), 1e6)
    extract = named(found, "extract")
    assert extract.core_s == pytest.approx(1e6 * 10e-3)
    assert extract.seconds == pytest.approx(1e6 * 8e-3 / 10)  # ten encoders; the other six CPUs read and write in less
    assert "10 encoders" in extract.place
    few = named(all_steps(config.with_overrides({"extract.num_actors": 15}), RATES, Machines(2, 8), 1e6), "extract")
    assert few.seconds == pytest.approx(1e6 * 2e-3)  # one CPU is left for all reading and writing
    assert named(found, "fit text").seconds == pytest.approx((1e6 * 1e-3 + 5e5 * known.FIT_S["tfidf"]) / 16)
    assert named(found, "fit pca of image").seconds == pytest.approx(5e5 * known.FIT_S["pca"] / 16)
    assert named(found, "reduce").seconds == pytest.approx(1e6 * 2e-3 / 16)
    assert named(found, "publish features").seconds == pytest.approx(1e6 * known.PUBLISH_S)
    assert named(found, "train model").seconds == pytest.approx(5e5 * 1e-4 * config.training.epochs)


def test_experts_are_counted_once(make_config: MakeConfig) -> None:
    """Catches hours of training that the plan does not tell,
    and experts counted that are variants or shared by them."""
    variants = {"image": {"model.modalities": ["image"]}, "a": {}, "b": {"model.fusion": "sum"}, "c": {"seed": 1}}
    config = make_config(variants=variants, model__experts=True)
    rates = replace(RATES, train=dict.fromkeys(variants, 1e-4))
    found = [step.name for step in train_steps(config, rates, Machines(1, 8), 1e6)]
    assert found == [
        *("train image", "train a", "train expert of text, beside a", "train b", "train c"),
        *("train expert of image, beside c", "train expert of text, beside c"),
    ]


def test_more_machines_help_what_is_shared_and_nothing_else(make_config: MakeConfig) -> None:
    """Catches a driver that gets faster with the cluster, and a cluster that never helps."""
    config = make_config(extract__num_actors=None, extract__chunk_rows=1024)
    one, many = (all_steps(config, RATES, Machines(nodes, 32), 1e9) for nodes in (1, 10_000))
    assert named(many, "publish features").seconds == named(one, "publish features").seconds
    assert named(many, "extract").seconds == pytest.approx(1e9 / 1024 * known.CHUNK_S)
    assert "the driver alone" in named(many, "extract").place
    assert named(one, "fit text").seconds == pytest.approx(10_000 * named(many, "fit text").seconds)
    for step, double in zip(one, all_steps(config, RATES, Machines(1, 32), 2e9), strict=True):
        assert double.seconds == pytest.approx(2 * step.seconds)


@pytest.mark.usefixtures("ray_local", "shapes")
def test_rates_are_those_of_the_run(make_config: MakeConfig) -> None:
    """Catches a plan by this project's rates although the user's own run has told better; rates of other encoders."""
    config = make_config(variants={"a": {}, "b": {}})
    uri = steps.run_folder(config)
    assert "no features yet" in rates_of(config, uri).source
    store = steps.extract_step(config)["a"]
    rates = rates_of(config, uri)
    assert "over 120 rows; 0 of 2 models" in rates.source
    assert rates.stages == pytest.approx(
        {k: v / 120 for k, v in store.manifest.stages.items()}, rel=0.02
    )  # the manifest rounds rows/s
    files = [path.stat().st_size for path in Path(store.uri, "data").iterdir()]
    assert rates.store_bytes == pytest.approx(sum(files) / 120)
    assert rates.train == {"a": known.TRAIN_S, "b": known.TRAIN_S}
    other = config.with_overrides({"modalities.image.encoder.image_size": 32})
    assert "no features yet" in rates_of(other, uri).source

    one = config.with_overrides({"variants": {"a": {"training.epochs": 2}}})
    steps.train_step(one, {"a": store})
    rates = rates_of(one, uri)
    assert "1 of 1 models" in rates.source
    assert 0 < rates.train["a"] != known.TRAIN_S


def test_what_was_never_measured_is_not_made_up(make_config: MakeConfig) -> None:
    """Catches a number for an encoder or a GPU that nobody has run."""
    with pytest.raises(ConfigError, match=r"no rate is known of encoder 'slow_encoder:SlowLength'.*mmkt extract"):
        rates_of(make_config(modalities__text__encoder="slow_encoder:SlowLength"), "/nowhere")
    text = plan(make_config(), RATES, Machines(4, 8, gpus=2, price=3.0), 1e6)
    assert re.search(r"encode image +GPUs: not measured", text)
    assert "together   at least" in text
    assert "each must encode" in text


def test_a_width_that_is_not_known_yet_is_estimated(make_config: MakeConfig) -> None:
    """Catches a first run with an encoder of one's own that ends before any work,
    as the encoder is not fitted yet."""
    config = make_config(modalities__text__encoder="late_encoder:Late")
    assert widths(config)["text"] == [known.USUAL_DIM, known.USUAL_DIM]
    reduced = config.with_overrides({"modalities.text.reduce": {"name": "pca", "dim": 16}})
    assert widths(reduced)["text"] == [known.USUAL_DIM, 16]
    assert 0 < stored_bytes(config) < stored_bytes(reduced)  # whose encoded features stay


def test_limits_tell_what_breaks_first(make_config: MakeConfig) -> None:
    """Catches a plan over a table that no worker can hold, told as feasible."""
    machines = Machines(2, 8)
    config = make_config()
    rows = min(limit.at for limit in find_limits(config, RATES, machines, 0))
    assert "features" in min(find_limits(config, RATES, machines, 0), key=lambda limit: limit.at).what
    assert "BREAKS" not in plan(config, RATES, machines, rows * 0.99)
    assert plan(config, RATES, machines, rows * 1.01).count("BREAKS") == 1
    joined = make_config(samples__combine={"name": "join"}, samples__sources__0__columns__key="id")
    assert any("join holds ids" in limit.what for limit in find_limits(joined, RATES, machines, 0))
    cnn = make_config(modalities__image__encoder={"name": "cnn", "pretrain": "colour", "image_size": 32})
    assert any("3,072 bytes each" in limit.what for limit in find_limits(cnn, RATES, machines, 0))


def test_cost_is_of_all_nodes_for_all_hours(make_config: MakeConfig) -> None:
    """Catches a price per hour that is paid once, or for one node."""
    rates = replace(RATES, train={"model": 3600 / (0.5 * 1e6 * 30)})  # an hour of training
    found = all_steps(make_config(), rates, Machines(10, 8), 1e6)
    hours = sum(step.seconds for step in found) / 3600
    assert f"cost {hours * 10 * 1000:,.0f};" in plan(make_config(), rates, Machines(10, 8, price=1000), 1e6)


def test_halving_costs_what_was_measured() -> None:
    """Catches candidates that are all trained to the end: docs/performance.md measured 2.2 of 18 epochs."""
    assert mean_epochs(load_config(CONFIGS / "openmoji_search.yaml")) == pytest.approx(2.2, abs=0.1)


def test_command_line(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a table without an answer, and a plan of nothing."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    command = ["plan", str(path), "--samples", "1e9", "--candidates", "1e6", "--nodes", "16", "--cpus-per-node", "32"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for line in ("1e+09 samples on 16 x 32 CPUs", "search 1e+06 candidates", "limits, the soonest first", "BREAKS"):
        assert line in text
    assert main([*command, "--nodes", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
