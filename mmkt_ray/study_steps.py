"""The studies of a run: those that `evaluation.studies` asks for, side by side,
and those that have a command of their own.

Called by steps.py after the comparison, and by the commands; each study is one file of studies/.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmkt_ray import progress, storage
from mmkt_ray.cluster.side_by_side import Call, SideBySide
from mmkt_ray.config import Config, EvaluationConfig
from mmkt_ray.done import Step, run_folder, steps_done
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.recommend import fused_to_study
from mmkt_ray.features.store import Store
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.stages import recorded
from mmkt_ray.studies.contribution import insights
from mmkt_ray.studies.label_issues import find_label_issues
from mmkt_ray.studies.missing import missing_curves
from mmkt_ray.studies.missing_results import missing_table
from mmkt_ray.studies.repeats import repeat
from mmkt_ray.studies.scores import transferability
from mmkt_ray.studies.scores_results import scores_table
from mmkt_ray.studies.seeds_results import seeds_table
from mmkt_ray.studies.transfer_matrix import transfer_matrix
from mmkt_ray.studies.transfer_results import transfer_table


def study_step(config: Config, stores: dict[str, Store], results: ResultsFile) -> None:
    """What `evaluation.studies` asks for; each leaves a file in the run folder that the report reads."""
    wanted = config.evaluation.studies
    with recorded(config, "study"):
        studies = [(step, call) for study, step, call in _studies(config, stores, results) if study in wanted]
        todo = {step.name: (step, call) for step, call in studies if not step.is_done()}
        with progress.stage("studies", len(studies), "studies") as it:
            it.advance(len(studies) - len(todo))
            calls = {name: call for name, (_, call) in todo.items()}
            for name, _ in SideBySide(
                calls, of=len(studies), num_bytes=max(store.table_bytes() for store in stores.values())
            ):
                todo[name][0].keep()
                it.advance()


def _studies(config: Config, stores: dict[str, Store], results: ResultsFile) -> Iterator[tuple[str, Step, Call]]:
    """Name of each study, the step that it is, and the call that does it; there may be several of a name."""
    uri, main = run_folder(config), results.main or ""
    evaluated = [steps_done(uri, ("compare",)), {name: store.identity for name, store in stores.items()}]
    yield "insight", Step(uri, "insight", evaluated, ["insight.json"]), Call(insights, (uri, stores))
    yield "scores", Step(uri, "scores", evaluated, ["transferability.json"]), Call(transferability, (uri, stores))
    variant, store = config.expand_variants().get(main) or config, stores.get(main) or next(iter(stores.values()))
    decided_by = [store.identity, variant.model_dump(mode="json", include={"modalities", "tasks", "seed"})]
    files, out = ["suspects.parquet", f"{store.place}/audit.json"], storage.join(uri, "suspects.parquet")
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
    with recorded(config, "scores"):
        return scores_table(transferability(run_folder(config), stores))


def transfer_step(config: Config, stores: dict[str, Store]) -> str:
    """Sources against targets, as text."""
    with recorded(config, "transfer"):
        return transfer_table(transfer_matrix(config, next(iter(stores.values())), run_folder(config)))


def repeat_step(config: Config, stores: dict[str, Store], num_seeds: int, against: str | None = None) -> str:
    """All variants from several seeds, as text."""
    with recorded(config, "repeat"):
        return seeds_table(repeat(config, stores, run_folder(config), num_seeds, against))


def missing_step(config: Config, stores: dict[str, Store]) -> str:
    """Scores of every evaluated variant of several modalities against the share of rows that lack one, as text."""
    uri = run_folder(config)
    fused = [n for n, variant in config.expand_variants().items() if len(variant.model_modalities) > 1]
    if not fused:
        raise ConfigError("--missing needs a model of several modalities: all of this run's read one only")
    with recorded(config, "missing"):
        return "\n\n".join(
            missing_table(missing_curves(storage.join(uri, "models", n), stores[n], uri, evaluation=config.evaluation))
            for n in fused
        )
