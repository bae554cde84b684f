"""`mmkt`: one subcommand per job. Parses, calls, prints where the result is."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mmkt_ray import progress
from mmkt_ray.arguments import build_parser
from mmkt_ray.commands import OUTWARD, run_command
from mmkt_ray.completion import commands, script
from mmkt_ray.config import Config, describe_fields, load_config, parse_override
from mmkt_ray.credentials import refuse_credentials
from mmkt_ray.errors import ConfigError, UserError, nearest
from mmkt_ray.failures import tell_error
from mmkt_ray.interrupts import interruptible
from mmkt_ray.lazy import uncollected
from mmkt_ray.submit import submit_command
from mmkt_ray.terminal import plain_output

if TYPE_CHECKING:
    from mmkt_ray.features.store import Store
    from mmkt_ray.inference.prediction import NewShards

CLOSED = 141  # exit status, as of a shell: 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 something that the user can mend, 130 after Ctrl-C,
    143 after SIGTERM, 141 where whoever read the output has closed it, 1 where the fault is ours."""
    with plain_output():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(words: list[str]) -> int:
    try:
        refuse_credentials(words, "command line")  # before anything is printed, by argparse too
    except UserError as error:
        print(f"mmkt: {error}", file=sys.stderr)
        return 2
    parser = build_parser()
    if wrong := _unknown_command(parser, words):
        print(f"mmkt: {wrong}", file=sys.stderr)
        return 2
    args = parser.parse_args(words)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    level = logging.WARNING if args.quiet else logging.DEBUG if args.verbose or args.debug else logging.INFO
    logging.getLogger("mmkt_ray").setLevel(level)
    with interruptible() as interrupt:
        if args.command == "serve":
            interrupt.said = "stopped"
        status = 0
        try:
            with nullcontext() if args.quiet else progress.shown():
                status = _run(args)
        except KeyboardInterrupt:
            interrupt.signum = interrupt.signum or signal.SIGINT
        except BrokenPipeError:  # whoever read it, such as `head`, has enough
            _close_output()
            status = CLOSED
        except Exception as error:  # Ray wraps what a worker raised
            if interrupt.signum is None:  # else it broke off because of that
                status = tell_error(error, args.debug)
        if interrupt.signum is not None:
            interrupt.end()
        return status


def _run(args: argparse.Namespace) -> int:
    if args.command in ("submit", "doctor"):
        return _tell_status(args)
    result = _dispatch(args)
    _stop_local_ray()
    print(result, flush=True)
    return 0


def _stop_local_ray() -> None:
    """End the Ray that the command has started, which takes a second or two:
    the prompt follows the result at once."""
    if local := sys.modules.get("mmkt_ray.cluster.local"):
        local.stop_local()


def _unknown_command(parser: argparse.ArgumentParser, words: list[str]) -> str:
    """What is wrong with the command, with the one that was meant; empty if it is known."""
    known = commands(parser)
    if not words or words[0].startswith("-") or words[0] in known:
        return ""
    return f"no command '{words[0]}': {nearest(words[0], known)}"


def _close_output() -> None:
    """Have nothing more written to a pipe that is closed, by Python at the end neither."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.close(nothing)


def _tell_status(args: argparse.Namespace) -> int:
    """The commands whose exit status is their answer."""
    if args.command == "submit":
        return submit_command(args)
    from mmkt_ray.doctor import examine
    from mmkt_ray.done import run_folder

    config = load_config(args.config, dict(parse_override(text) for text in args.overrides))
    findings = examine(config, run_folder(config))
    print("\n".join(map(str, findings)))
    return int(not all(finding.ok for finding in findings))


def _dispatch(args: argparse.Namespace) -> str:
    if args.command in OUTWARD:
        return run_command(args)
    if args.command == "fetch":
        with progress.stage("fetch"):
            from mmkt_ray.samples.fetch import fetch

            return "\n".join(fetch(name, args.out) for name in args.names)
    if args.command == "config" and args.config is None:
        return _config_help()
    if args.command == "completion":
        return script(build_parser(), args.shell)
    if args.command == "init":
        from mmkt_ray.init.writing import init

        return init(args.data, args.target, args.out, as_classes=args.classes, force=args.force)
    if args.command == "predict":
        return _predict(args)
    if args.command == "evaluate" and (args.model or args.data or args.config is None):
        return _score_files(args)
    config = load_config(args.config, dict(parse_override(text) for text in args.overrides))
    if args.command == "run" and args.quick:
        from mmkt_ray.quick import quick

        config = quick(config)
    if args.command == "plan":
        from mmkt_ray.done import run_folder
        from mmkt_ray.plan import plan_command

        return plan_command(args, config, run_folder(config))
    if args.command == "config":
        import yaml

        return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return _step(args, config)


def _step(args: argparse.Namespace, config: Config) -> str:
    from mmkt_ray import done, storage
    from mmkt_ray.locks import locked

    if args.command == "report":
        with uncollected(freeze=True):
            from mmkt_ray import steps

        return f"report: {steps.report_step(config)}"
    with locked(done.run_folder(config)):  # for all steps of the command
        if args.command == "run" and (printed := done.printed_before(config)) is not None:
            text = f"{done.NOTHING}\n\n{printed}"
        else:
            text = _locked_step(args, config)
        if args.command == "run" and args.json:
            found = storage.read_json(storage.join(done.run_folder(config), "report", "results.json"))
            return json.dumps(found, indent=2, ensure_ascii=False)
        return text


def _locked_step(args: argparse.Namespace, config: Config) -> str:
    with uncollected(freeze=True):
        _start_ahead(trains=args.command != "extract")
        from mmkt_ray import steps, study_steps  # torch and ray load here, so that what does not need them is quick
        from mmkt_ray.done import run_folder
        from mmkt_ray.scoring.tables import comparison_table

    command = args.command
    if command == "run":
        return steps.run_steps(config)
    if command == "search":
        return _search(config)
    stores = steps.extract_step(config, trains=command in ("train", "evaluate", "repeat"))
    if command in ("evaluate", "repeat", "transfer"):
        steps.check_test(stores)
    if command == "extract":
        return "\n".join(sorted({f"features: {store.uri}" for store in stores.values()}))
    if command == "scores":
        return study_steps.scores_step(config, stores)
    if command == "transfer":
        return study_steps.transfer_step(config, stores) + steps.refresh_report(config)
    if command == "repeat":
        table = study_steps.repeat_step(config, stores, args.seeds, args.against)
        if args.missing:
            table += "\n\n" + _missing_over_seeds(config, stores, args.seeds)
        return table + steps.refresh_report(config)
    steps.train_step(config, stores)
    if command == "train":
        return f"models: {run_folder(config)}/models"
    table = comparison_table(steps.evaluate_step(config, stores))
    return (
        f"{table}\n\n{study_steps.missing_step(config, stores)}{steps.refresh_report(config)}"
        if args.missing
        else table
    )


def _missing_over_seeds(config: Config, stores: dict[str, Store], num_seeds: int) -> str:
    from mmkt_ray.done import run_folder
    from mmkt_ray.studies.missing_results import missing_table
    from mmkt_ray.studies.missing_seeds import missing_over_seeds

    seeds = [config.training_seed + i for i in range(num_seeds)]
    found = missing_over_seeds(config, stores, run_folder(config), seeds)
    return "\n\n".join(map(missing_table, found.values()))


def _search(config: Config) -> str:
    from mmkt_ray import steps
    from mmkt_ray.done import run_folder
    from mmkt_ray.search.search import check_search, result_table, search

    check_search(config)
    config = config.model_copy(update={"variants": {}})
    store = steps.extract_step(config)["model"]
    steps.check_test({"model": store})
    folder = run_folder(config)
    result = search(config, store, folder)
    places = f"leaderboard: {folder}/search/leaderboard.parquet"
    places += f"\nwinner: {folder}/models/search_winner" if result.winner else ""
    return f"{result_table(result)}\n\n{places}{steps.refresh_report(config)}"


def _start_ahead(trains: bool = True) -> None:
    from mmkt_ray.cluster.local import start_ahead

    start_ahead(trains)


def _predict(args: argparse.Namespace) -> str:
    with uncollected(freeze=True):
        _start_ahead(trains=False)
        from mmkt_ray.inference.output_formats import Output
        from mmkt_ray.inference.prediction import predict

    output = Output(args.format, args.join, args.top_k, args.wide)
    return f"predictions: {predict(args.model, args.inputs, args.out, _reading(args), output)}"


def _score_files(args: argparse.Namespace) -> str:
    if not (args.model and args.data and args.out) or args.config or args.missing:
        raise ConfigError(
            "mmkt evaluate takes either CONFIG, to score the models of its run, or --model MODEL --data FILE... "
            "--out FOLDER, to score one model on labelled files"
        )
    with uncollected(freeze=True):
        _start_ahead(trains=False)
        from mmkt_ray.evaluation.scoring_files import score_files, scores_text

    result = score_files(args.model, args.data, args.out, _reading(args))
    return f"{scores_text(result)}\n\npredictions: {result.predictions}\nmetrics: {args.out}/metrics.json"


def _reading(args: argparse.Namespace) -> NewShards:
    from mmkt_ray.inference.prediction import NewShards

    columns = dict(_column_pair(text) for text in args.column)
    own = dict(parse_override(text) for text in args.overrides)
    return NewShards(args.like, args.reader, columns, args.max_reject_frac, own, args.trust_code)


def _column_pair(text: str) -> tuple[str, str]:
    """`OURS=THEIRS` in two. Raises: ConfigError."""
    ours, _, theirs = (part.strip() for part in text.partition("="))
    if not ours or not theirs:
        raise ConfigError(f"--column takes OURS=THEIRS, a modality and what the files call it, got '{text}'")
    return ours, theirs


def _config_help() -> str:
    lines = ["Every key of a config. (name) after a key: one of several choices; [] a list; .<name> a mapping.", ""]
    for key, default, text in describe_fields():
        lines.append(f"{key}  [{default}]" if default else key)
        lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
