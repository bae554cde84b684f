"""A whole run, step by step: features, models, evaluation, report. Each step skips what is done already.

You come from `jobs/run.py` or `mmkt run`; the first step is features/extract.py,
which reads shards by samples/readers.py.

Run folder: features/ encoders/ models/<variant>/ report/ predictions/ run.json
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mmkt_ray import progress, storage
from mmkt_ray.cluster.side_by_side import Call, SideBySide
from mmkt_ray.config import Config, EvaluationConfig, fingerprint
from mmkt_ray.doctor import check_before_work
from mmkt_ray.done import NOTHING, Step, keep_printed, listing, printed_before, run_folder, steps_done
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.evaluate import evaluate_model
from mmkt_ray.evaluation.model_readme import README, write_readme
from mmkt_ray.evaluation.scoring_baselines import evaluate_baselines, logreg_calls
from mmkt_ray.features.extract import extract
from mmkt_ray.features.store import Store
from mmkt_ray.locks import locked
from mmkt_ray.scoring.provenance import model_fingerprint
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.run_file import Place, RunFile
from mmkt_ray.scoring.tables import comparison_table, recommendation_text
from mmkt_ray.stages import recorded, without_seconds, write_run_json
from mmkt_ray.studies.gallery import write_gallery
from mmkt_ray.study_steps import study_step
from mmkt_ray.tracking import check_tracking, track
from mmkt_ray.training.variants import train_singles, train_variants

log = logging.getLogger(__name__)

EXTRACTED = {"samples", "modalities", "tasks", "extract", "seed", "data_root"}  # sections that decide features


def run_steps(config: Config) -> str:
    """Do what is not done yet. Returns the comparison as a text table, the path of the report, and the model to ship.

    If nothing was to be done, the first line says so.
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
    """The feature store of each variant. Variants that differ only in model or training settings share a store.

    Sources and cluster are examined before a first extraction. trains: training follows, so its workers must fit too.
    """
    check_tracking(config)
    uri = run_folder(config)
    variants = config.expand_variants()
    keys = {name: fingerprint(variant.model_dump(mode="json", include=EXTRACTED)) for name, variant in variants.items()}
    storage.make_dir(uri)
    before = RunFile.of(uri).extracted
    with recorded(config, "extract") as added:
        if not all(_is_there(uri, before.get(key)) for key in keys.values()):
            check_before_work(config, uri, trains)
        stores: dict[str, Store] = {}
        for name, key in keys.items():
            if key not in stores:
                stores[key] = extract(variants[name], uri)
        added.extracted = before | {key: store.place for key, store in stores.items()}
    return {name: stores[key] for name, key in keys.items()}


def check_test(stores: dict[str, Store]) -> None:
    """See, before anything is trained, that there are test rows to compare models on.
    Raises: DataError if there are none."""
    for store in {s.uri: s for s in stores.values()}.values():
        counts = store.manifest.counts
        if not (num_rows := counts.by_split.get("test")):
            raise DataError(
                "no sample is in the test split, on which models are compared: set samples.split.test_frac above 0, "
                "or give a source `split: test`; `mmkt train` needs none"
            )
        without = [task for task, by_split in sorted(counts.by_task.items()) if not by_split.get("test")]
        message = (
            f"none of the {num_rows:,} samples in the test split has a label of "
            f"{' or '.join(map(repr, without))}"
        )
        if len(without) == len(counts.by_task):
            raise DataError(
                f"{message}, so there is nothing to compare models on: map the label column in the source of the "
                "test split, or let samples.split draw one of labelled samples; `mmkt train` needs none"
            )
        if without:
            log.warning("%s: the comparison leaves that out", message)


def _is_there(uri: str, store: str | None) -> bool:
    """Whether an earlier extraction finished this store; it may lack new shards."""
    return store is not None and storage.exists(storage.join(uri, store, "manifest.json"))


def train_step(config: Config, stores: dict[str, Store]) -> None:
    """Train a model for each variant, and one of each modality alone.
    Each folder gets the encoders of its features."""
    uri = run_folder(config)
    variants = config.expand_variants()
    with recorded(config, "train") as added, progress.stage("models", len(variants), "models") as it:
        for name, summary in train_variants(variants, stores, storage.join(uri, "models")):
            if summary.status == "up to date":
                log.info("model %s is up to date", name)
            else:
                log.info("model %s: best epoch %s, %.1f s", name, summary.best_epoch, summary.seconds)
            stores[name].copy_encoders(variants[name].model_modalities, uri, storage.join(uri, "models", name))
            it.advance()
        singles = dict[str, Place]()
        for store in {s.uri: s for s in stores.values()}.values():
            own = {name: variant for name, variant in variants.items() if stores[name].uri == store.uri}
            several = f" ({store.uri.rsplit('/', 1)[-1]})" if len({s.uri for s in stores.values()}) > 1 else ""
            for modality, model_uri in train_singles(own, store, storage.join(uri, "models")).items():
                store.copy_encoders([modality], uri, model_uri)
                place = Place(store=store.place, model=f"models/.experts/{model_uri.rsplit('/', 1)[-1]}")
                singles[f"only:{modality}{several}"] = place
        added.singles = singles


def evaluate_step(config: Config, stores: dict[str, Store]) -> ResultsFile:
    """Score every model and the baselines on the test split, and compare them."""
    uri, by_uri = run_folder(config), {s.uri: s for s in stores.values()}
    scored = {f"evaluate {place}": (step, call) for place, step, call in _to_evaluate(config, stores)}
    fitted = {
        store_uri: _baselines_step(config, store) for store_uri, store in by_uri.items() if config.evaluation.baselines
    }
    total = len(scored) + len(fitted)
    with recorded(config, "evaluate"), progress.stage("scores", total, "models") as it:
        calls, folder = dict[str, Call](), storage.join(uri, "models")
        to_score = [store_uri for store_uri, step in fitted.items() if not step.is_done()]
        for store_uri in to_score:
            calls |= {f"{store_uri} {n}": call for n, call in logreg_calls(config, by_uri[store_uri], folder).items()}
        calls |= {name: call for name, (step, call) in scored.items() if not step.is_done()}
        it.advance(total - len(to_score) - len(scored.keys() & calls.keys()))
        for name, _ in SideBySide(calls, of=total, num_bytes=max(store.table_bytes() for store in stores.values())):
            if name in scored:
                scored[name][0].keep()
                it.advance()
        for store_uri in to_score:
            step = fitted[store_uri]
            evaluate_baselines(config, by_uri[store_uri], storage.join(uri, step.name))
            step.keep()
            it.advance()
        write_run_json(config, stores)
        results = _compare(uri)
        track(config, results)
        if (main := results.main) is not None and main in stores:
            model_uri = storage.join(uri, "models", main)
            decided_by = steps_done(uri, (f"evaluate models/{main}",))
            Step(uri, f"gallery {main}", decided_by, [f"models/{main}/gallery.json"]).once(
                lambda: write_gallery(model_uri)
            )
        return results


def _to_evaluate(config: Config, stores: dict[str, Store]) -> Iterator[tuple[str, Step, Call]]:
    """For each model of the run: its place, the step that scores it, and the call that does so."""
    uri, by_place = run_folder(config), {store.place: store for store in stores.values()}
    models = [(name, f"models/{name}", stores[name], v.evaluation) for name, v in config.expand_variants().items()]
    for name, place in RunFile.of(uri).singles.items():
        models.append((name, place.model, by_place[place.store or ""], config.evaluation))
    files = ("config.json", "metrics.json", "predictions-test.parquet", "predictions-heldout.parquet", README)
    for name, folder, store, evaluation in models:
        model_uri = storage.join(uri, folder)
        decided_by = [model_fingerprint(model_uri), store.identity, evaluation.model_dump(mode="json"), name]
        step = Step(uri, f"evaluate {folder}", decided_by, [f"{folder}/{file}" for file in files])
        yield folder, step, Call(_evaluate, (model_uri, store, evaluation, name))


def _evaluate(model_uri: str, store: Store, evaluation: EvaluationConfig, name: str) -> None:
    evaluate_model(model_uri, store, evaluation=evaluation, name=name)
    write_readme(model_uri, store.manifest)


def _baselines_step(config: Config, store: Store) -> Step:
    """The step that fits and scores the baselines of a store."""
    uri, folder = run_folder(config), f"baselines/{store.uri.rsplit('/', 1)[-1]}"
    settings = config.model_dump(mode="json", include={"evaluation", "tasks", "seed"})
    decided_by = [store.identity, sorted(config.modalities), settings]
    return Step(uri, folder, decided_by, [f"{folder}/metrics.json", f"{folder}/predictions-test.parquet"])


def _compare(uri: str) -> ResultsFile:
    """The comparison of all that was evaluated, made again only if that has changed."""
    decided_by = [steps_done(uri, ("evaluate ", "baselines/")), without_seconds(uri)]
    Step(uri, "compare", decided_by, ["report/results.json"]).once(lambda: compare(uri))
    return ResultsFile.read(storage.join(uri, "report", "results.json"))


def report_step(config: Config, again: bool = True) -> str:
    """Write the HTML page; returns its path. again: even if nothing that it shows has changed."""
    uri = run_folder(config)
    with recorded(config, "report"):
        shown = {place: about for place, about in listing(uri).items() if not place.startswith(("report/", "run.json"))}
        files = ["report/index.html", "report/results.json"]
        Step(uri, "report", [shown, without_seconds(uri)], files).once(lambda: _build_report(uri), again)
        return storage.join(uri, "report", "index.html")


def _build_report(uri: str) -> None:
    from mmkt_ray.report.page import build_report  # with Matplotlib: 0.4 s that no command waits for as it starts

    build_report(uri)


def refresh_report(config: Config) -> str:
    """Write the page anew, if the run has one. Returns a line with its path, else nothing."""
    if not storage.exists(storage.join(run_folder(config), "report", "index.html")):
        return ""
    return f"\n\nreport: {report_step(config)}"
