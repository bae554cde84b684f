"""A whole run, step by step: features, models, evaluation, report. Each step skips what is done already.

You come from `jobs/run.py` or `mmkt run`; the first step is features/extract.py, which reads shards by samples/readers.py.

Run folder: features/ encoders/ models/<variant>/ report/ predictions/ run.json
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmkt_ray import cluster, progress, storage
from mmkt_ray.cluster.side_by_side import Call, SideBySide
from mmkt_ray.config import Config, EvaluationConfig, fingerprint
from mmkt_ray.doctor import check_before_work
from mmkt_ray.done import NOTHING, Step, keep_printed, listing, printed_before, run_folder, steps_done
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.evaluate import evaluate_model
from mmkt_ray.evaluation.readme import README, write_readme
from mmkt_ray.evaluation.recommend import fused_to_study
from mmkt_ray.evaluation.scoring_baselines import evaluate_baselines, logreg_calls
from mmkt_ray.features.extract import extract
from mmkt_ray.features.store import Store
from mmkt_ray.locks import locked
from mmkt_ray.report.page import build_report
from mmkt_ray.scoring.provenance import model_fingerprint
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.run_file import Place, RunFile
from mmkt_ray.scoring.tables import comparison_table, recommendation_text
from mmkt_ray.studies.contribution import insights
from mmkt_ray.studies.gallery import write_gallery
from mmkt_ray.studies.label_issues import find_label_issues
from mmkt_ray.studies.missing import missing_curves
from mmkt_ray.studies.missing_results import missing_table
from mmkt_ray.studies.repeats import repeat
from mmkt_ray.studies.scores import transferability
from mmkt_ray.studies.scores_results import scores_table
from mmkt_ray.studies.seeds_results import seeds_table
from mmkt_ray.studies.transfer_matrix import transfer_matrix
from mmkt_ray.studies.transfer_results import transfer_table
from mmkt_ray.tracking import check_tracking, track
from mmkt_ray.training.variants import train_singles, train_variants

log = logging.getLogger(__name__)

EXTRACTED = {"samples", "modalities", "tasks", "extract", "seed", "data_root"}  # sections that decide features
LIBRARIES = ("ray", "torch", "torchvision", "scikit-learn", "pyarrow", "pandas", "numpy")


def run(config: Config) -> str:
    """Everything that is not done yet; returns the comparison as a table of text, ending with where the report is.

    Where all was done before, a first line says so.
    """
    uri = run_folder(config)
    with locked(uri):
        if (printed := printed_before(config)) is not None:
            return f"{NOTHING}\n\n{printed}"
        before = listing(uri)
        stores = extract_step(config, trains=True)
        check_test(stores)
        train_step(config, stores)
        results = evaluate_step(config, stores)
        study_step(config, stores, results)
        page = report_step(config, again=False)
        text = f"{comparison_table(results)}\n\nreport: {page}\n\n{recommendation_text(results, uri)}".rstrip()
        keep_printed(config, text)
        return f"{NOTHING}\n\n{text}" if listing(uri) == before else text


def extract_step(config: Config, trains: bool = False) -> dict[str, Store]:
    """The feature store of each variant; variants that differ in model or training only share one.

    What has never been extracted is examined first. trains: training follows, and must fit too.
    """
    check_tracking(config)
    uri = run_folder(config)
    variants = config.expand_variants()
    keys = {name: fingerprint(variant.model_dump(mode="json", include=EXTRACTED)) for name, variant in variants.items()}
    storage.make_dir(uri)
    before = RunFile.of(uri).extracted
    with _record(config, "extract") as added:
        if not all(_is_there(uri, before.get(key)) for key in keys.values()):
            check_before_work(config, uri, trains)
        stores: dict[str, Store] = {}
        for name, key in keys.items():
            if key not in stores:
                stores[key] = extract(variants[name], uri)
        added.extracted = before | {key: _in_features(store) for key, store in stores.items()}
    return {name: stores[key] for name, key in keys.items()}


def check_test(stores: dict[str, Store]) -> None:
    """Before anything is trained that is to be compared. Raises: DataError if there is nothing to compare it on."""
    for store in {s.uri: s for s in stores.values()}.values():
        counts = store.manifest.counts
        if not (num_rows := counts.by_split.get("test")):
            raise DataError(
                "no sample is in the test split, on which models are compared: set samples.split.test_frac above 0, or give a "
                "source `split: test`; `mmkt train` needs none"
            )
        without = [task for task, by_split in sorted(counts.by_task.items()) if not by_split.get("test")]
        message = f"none of the {num_rows:,} samples in the test split has a label of {' or '.join(map(repr, without))}"
        if len(without) == len(counts.by_task):
            raise DataError(
                f"{message}, so there is nothing to compare models on: map the label column in the source of the test split, or "
                "let samples.split draw one of labelled samples; `mmkt train` needs none"
            )
        if without:
            log.warning("%s: the comparison leaves that out", message)


def _is_there(uri: str, store: str | None) -> bool:
    """Whether what an earlier extraction left is complete; new shards in it are not asked for."""
    return store is not None and storage.exists(storage.join(uri, store, "manifest.json"))


def train_step(config: Config, stores: dict[str, Store]) -> None:
    """A model folder for each variant, with the encoders that its features came from, and one of each modality alone."""
    uri = run_folder(config)
    variants = config.expand_variants()
    with _record(config, "train") as added, progress.stage("models", len(variants), "models") as it:
        for name, summary in train_variants(variants, stores, storage.join(uri, "models")):
            if summary.status == "up to date":
                log.info("model %s is up to date", name)
            else:
                log.info("model %s: best epoch %s, %.1f s", name, summary.best_epoch, summary.seconds)
            _copy_encoders(uri, storage.join(uri, "models", name), stores[name], variants[name].model_modalities)
            it.advance()
        singles = dict[str, Place]()
        for store in {s.uri: s for s in stores.values()}.values():
            own = {name: variant for name, variant in variants.items() if stores[name].uri == store.uri}
            several = f" ({store.uri.rsplit('/', 1)[-1]})" if len({s.uri for s in stores.values()}) > 1 else ""
            for modality, model_uri in train_singles(own, store, storage.join(uri, "models")).items():
                _copy_encoders(uri, model_uri, store, [modality])
                place = Place(store=_in_features(store), model=f"models/.experts/{model_uri.rsplit('/', 1)[-1]}")
                singles[f"only:{modality}{several}"] = place
        added.singles = singles


def _copy_encoders(uri: str, model_uri: str, store: Store, modalities: Sequence[str]) -> None:
    """Put the encoders of these modalities from a run's folder into a model's."""
    for modality in modalities:
        for folder in store.manifest.modalities[modality].folders:
            storage.copy_folder(storage.join(uri, "encoders", folder), storage.join(model_uri, "encoders", folder))


def evaluate_step(config: Config, stores: dict[str, Store]) -> ResultsFile:
    """Metrics and predictions of every variant and of the baselines on the test split, and their comparison."""
    uri, by_uri = run_folder(config), {s.uri: s for s in stores.values()}
    scored = {f"evaluate {place}": (step, call) for place, step, call in _to_evaluate(config, stores)}
    fitted = {store_uri: _baselines_step(config, store) for store_uri, store in by_uri.items() if config.evaluation.baselines}
    total = len(scored) + len(fitted)
    with _record(config, "evaluate"), progress.stage("scores", total, "models") as it:
        calls, folder = dict[str, Call](), storage.join(uri, "models")
        to_score = [store_uri for store_uri, step in fitted.items() if not step.is_done()]
        for store_uri in to_score:
            calls |= {f"{store_uri} {n}": call for n, call in logreg_calls(config, by_uri[store_uri], folder).items()}
        calls |= {name: call for name, (step, call) in scored.items() if not step.is_done()}
        it.advance(total - len(to_score) - len(scored.keys() & calls.keys()))
        for name, _ in SideBySide(calls, of=total, num_bytes=_table_bytes(stores)):
            if name in scored:
                scored[name][0].keep()
                it.advance()
        for store_uri in to_score:
            step = fitted[store_uri]
            evaluate_baselines(config, by_uri[store_uri], storage.join(uri, step.name))
            step.keep()
            it.advance()
        _write_run_json(config, stores)
        results = _compare(uri)
        track(config, results)
        if (main := results.main) is not None and main in stores:
            model_uri = storage.join(uri, "models", main)
            decided_by = steps_done(uri, (f"evaluate models/{main}",))
            Step(uri, f"gallery {main}", decided_by, [f"models/{main}/gallery.json"]).once(lambda: write_gallery(model_uri))
        return results


def _to_evaluate(config: Config, stores: dict[str, Store]) -> Iterator[tuple[str, Step, Call]]:
    """Place of each model of the run, the step that scores it, and the call that does it."""
    uri, by_place = run_folder(config), {_in_features(store): store for store in stores.values()}
    models = [(name, f"models/{name}", stores[name], v.evaluation) for name, v in config.expand_variants().items()]
    for name, place in RunFile.of(uri).singles.items():
        models.append((name, place.model, by_place[place.store or ""], config.evaluation))
    files = ("config.json", "metrics.json", "predictions-test.parquet", "predictions-heldout.parquet", README)
    for name, folder, store, evaluation in models:
        model_uri = storage.join(uri, folder)
        decided_by = [model_fingerprint(model_uri), _identity(store), evaluation.model_dump(mode="json"), name]
        step = Step(uri, f"evaluate {folder}", decided_by, [f"{folder}/{file}" for file in files])
        yield folder, step, Call(_evaluate, (model_uri, store, evaluation, name))


def _evaluate(model_uri: str, store: Store, evaluation: EvaluationConfig, name: str) -> None:
    evaluate_model(model_uri, store, evaluation=evaluation, name=name)
    write_readme(model_uri, store.manifest)


def _baselines_step(config: Config, store: Store) -> Step:
    """The step that fits and scores the baselines of a store."""
    uri, folder = run_folder(config), f"baselines/{store.uri.rsplit('/', 1)[-1]}"
    settings = config.model_dump(mode="json", include={"evaluation", "tasks", "seed"})
    decided_by = [_identity(store), sorted(config.modalities), settings]
    return Step(uri, folder, decided_by, [f"{folder}/metrics.json", f"{folder}/predictions-test.parquet"])


def _compare(uri: str) -> ResultsFile:
    """The comparison of all that was evaluated, made again only if that has changed."""
    decided_by = [steps_done(uri, ("evaluate ", "baselines/")), _without_seconds(uri)]
    Step(uri, "compare", decided_by, ["report/results.json"]).once(lambda: compare(uri))
    return ResultsFile.read(storage.join(uri, "report", "results.json"))


def _table_bytes(stores: dict[str, Store]) -> int:
    """That the largest table of features takes."""
    return max(store.table_bytes() for store in stores.values())


def _identity(store: Store) -> list[Any]:
    """What tells a store's content from any other's."""
    return [store.manifest.fingerprint, store.manifest.checksums]


def study_step(config: Config, stores: dict[str, Store], results: ResultsFile) -> None:
    """What `evaluation.studies` asks for; each leaves a file in the run folder that the report reads."""
    wanted = config.evaluation.studies
    with _record(config, "study"):
        studies = [(step, call) for study, step, call in _studies(config, stores, results) if study in wanted]
        todo = {step.name: (step, call) for step, call in studies if not step.is_done()}
        with progress.stage("studies", len(studies), "studies") as it:
            it.advance(len(studies) - len(todo))
            calls = {name: call for name, (_, call) in todo.items()}
            for name, _ in SideBySide(calls, of=len(studies), num_bytes=_table_bytes(stores)):
                todo[name][0].keep()
                it.advance()


def _studies(config: Config, stores: dict[str, Store], results: ResultsFile) -> Iterator[tuple[str, Step, Call]]:
    """Name of each study, the step that it is, and the call that does it; there may be several of a name."""
    uri, main = run_folder(config), results.main or ""
    evaluated = [steps_done(uri, ("compare",)), {name: _identity(store) for name, store in stores.items()}]
    yield "insight", Step(uri, "insight", evaluated, ["insight.json"]), Call(insights, (uri, stores))
    yield "scores", Step(uri, "scores", evaluated, ["transferability.json"]), Call(transferability, (uri, stores))
    variant, store = config.expand_variants().get(main) or config, stores.get(main) or next(iter(stores.values()))
    decided_by = [_identity(store), variant.model_dump(mode="json", include={"modalities", "tasks", "seed"})]
    files, out = ["suspects.parquet", f"{_in_features(store)}/audit.json"], storage.join(uri, "suspects.parquet")
    yield "suspects", Step(uri, "suspects", decided_by, files), Call(find_label_issues, (store, variant, out))
    for name in fused_to_study(results):
        about = results.models[name]
        folder = about.folder_to_ship or about.folder
        store = next(s for s in stores.values() if s.manifest.fingerprint == about.store)
        settings = config.evaluation.model_dump(mode="json")
        step = Step(uri, f"missing {folder}", [evaluated, settings], [f"{folder}/missing.json"])
        yield "missing", step, Call(_missing, (storage.join(uri, folder), store, uri, config.evaluation))


def _missing(model_uri: str, store: Store, run_uri: str, evaluation: EvaluationConfig) -> None:
    missing_curves(model_uri, store, run_uri, evaluation=evaluation)


def scores_step(config: Config, stores: dict[str, Store]) -> str:
    """How well the features will serve each task, before anything is trained, as text."""
    with _record(config, "scores"):
        return scores_table(transferability(run_folder(config), stores))


def transfer_step(config: Config, stores: dict[str, Store]) -> str:
    """Sources against targets, as text."""
    with _record(config, "transfer"):
        return transfer_table(transfer_matrix(config, next(iter(stores.values())), run_folder(config)))


def repeat_step(config: Config, stores: dict[str, Store], num_seeds: int, against: str | None = None) -> str:
    """All variants from several seeds, as text."""
    with _record(config, "repeat"):
        return seeds_table(repeat(config, stores, run_folder(config), num_seeds, against))


def missing_step(config: Config, stores: dict[str, Store]) -> str:
    """Scores of every evaluated variant of several modalities against the share of rows that lack one, as text."""
    uri = run_folder(config)
    fused = [n for n, variant in config.expand_variants().items() if len(variant.model_modalities) > 1]
    if not fused:
        raise ConfigError("--missing needs a model of several modalities: all of this run's read one only")
    with _record(config, "missing"):
        return "\n\n".join(
            missing_table(missing_curves(storage.join(uri, "models", n), stores[n], uri, evaluation=config.evaluation))
            for n in fused
        )


def report_step(config: Config, again: bool = True) -> str:
    """The HTML page; returns where it is. again: also where nothing that it shows has changed since it was made."""
    uri = run_folder(config)
    with _record(config, "report"):
        shown = {place: about for place, about in listing(uri).items() if not place.startswith(("report/", "run.json"))}
        files = ["report/index.html", "report/results.json"]
        Step(uri, "report", [shown, _without_seconds(uri)], files).once(lambda: build_report(uri), again)
        return storage.join(uri, "report", "index.html")


def refresh_report(config: Config) -> str:
    """The page made anew with what has come to the run since, and a line that says where; nothing if there is none yet."""
    if not storage.exists(storage.join(run_folder(config), "report", "index.html")):
        return ""
    return f"\n\nreport: {report_step(config)}"


@dataclass
class _Added:
    """What a stage adds to run.json, beside its seconds."""

    extracted: dict[str, str] | None = None
    singles: dict[str, Place] | None = None


@contextmanager
def _record(config: Config, stage: str) -> Iterator[_Added]:
    """Keep the seconds of a stage that did something, and what it adds, in run.json; a run folder that is there is locked."""
    start, added, uri = time.perf_counter(), _Added(), run_folder(config)
    with locked(uri) if storage.exists(uri) else nullcontext(), progress.stage(stage):
        before = listing(uri)
        yield added
        known = RunFile.of(uri)
        changed = known.replaced(**{name: value for name, value in vars(added).items() if value is not None})
        if listing(uri) == before and changed.to_dict() == known.to_dict():
            log.info("%s: nothing was to be done", stage)
            return
        seconds = known.seconds | {stage: round(time.perf_counter() - start, 2)}
        changed.replaced(seconds=seconds).keep(uri)


def _without_seconds(uri: str) -> dict[str, Any]:
    """What run.json says of the run, but for how long its stages took."""
    return {key: value for key, value in RunFile.of(uri).to_dict().items() if key != "seconds"}


def _write_run_json(config: Config, stores: dict[str, Store]) -> None:
    uri = run_folder(config)
    known = RunFile.of(uri)
    changed = known.replaced(
        name=config.name,
        config=config.model_dump(mode="json"),
        variants={name: Place(store=_in_features(store), model=f"models/{name}") for name, store in stores.items()},
        versions={name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        commit=read_commit(),
        hardware=hardware(),
    )
    if changed.to_dict() != known.to_dict():
        changed.keep(uri)


def _in_features(store: Store) -> str:
    """A store's place in its run folder."""
    return f"features/{store.uri.rsplit('/', 1)[-1]}"


def read_commit() -> str | None:
    """The commit of the code that ran, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """Cores, processor kind and memory of this machine."""
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return f"{cluster.cores()} cores, {platform.machine()}, {memory_gib} GiB"
