"""`mmkt`: one subcommand per job. Parses, calls, prints where the result is."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mmkt_ray import __version__, progress
from mmkt_ray.commands import NAMES as OUTWARD
from mmkt_ray.commands import add_commands, run_command
from mmkt_ray.completion import SHELLS, commands, script
from mmkt_ray.config import Config, describe_fields, load_config, parse_override
from mmkt_ray.credentials import refuse_credentials
from mmkt_ray.errors import ConfigError, ResourceError, UserError, nearest
from mmkt_ray.interrupts import interruptible
from mmkt_ray.submit import COMMANDS as SUBMITTED
from mmkt_ray.submit import submit_command
from mmkt_ray.terminal import plain_output

if TYPE_CHECKING:
    from mmkt_ray.features.store import Store
    from mmkt_ray.inference.prediction import NewShards

DESCRIPTION = """\
Multimodal knowledge transfer as batch processing on Ray: what does each modality know, what transfers, which model to ship?

A run goes from raw shards to a report:  extract -> train -> evaluate -> report  (`mmkt run` does all four).
Every step is resumable: give the same command again, and what is done already is not done again.
"""
CLOSED = 141  # exit status, as of a shell: 128 + SIGPIPE
DATA_SETS = ("openmoji", "openmoji-keywords", "cifar10", "20news")
EXAMPLES = """\
examples:
  mmkt run jobs/configs/openmoji.yaml                      everything, on this machine
  mmkt run CONFIG --set training.epochs=5 --set seed=1     with other values
  mmkt config                                              every key of a config, with its default and meaning
  mmkt predict runs/openmoji/models/concat new/*.parquet   a trained model on new shards
  mmkt evaluate --model runs/openmoji/models/concat --data labelled.csv --out scored   how good it is on them

On a cluster the same is submitted: mmkt submit CONFIG --address http://HEAD:8265
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="mmkt", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mmkt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    steps = {
        "run": "everything: extract, train, evaluate, report",
        "extract": "raw shards -> features in Parquet",
        "train": "features -> models (extracts first if needed)",
        "evaluate": "models -> metrics, predictions and their comparison",
        "search": "features -> thousands of candidates, and the winner on test (extracts first if needed)",
        "scores": "features -> how well they will serve each task, before anything is trained",
        "transfer": "what transfers from which modality and task to which, over label budgets and seeds",
        "repeat": "every variant from several seeds: which differences are luck",
        "report": "result files -> HTML page, plots and tables",
    }
    for name, text in steps.items():
        command = commands.add_parser(name, help=text, description=text, epilog="all keys of a config: mmkt config")
        number = "?" if name == "evaluate" else None  # --model may take its place
        command.add_argument("config", nargs=number, metavar="CONFIG", help="YAML file; see jobs/configs/")
        _add_set(command)
        if name == "run":
            command.add_argument(
                "--quick", action="store_true", help="a first answer: some of the rows, few steps, no studies"
            )
            command.add_argument("--json", action="store_true", help="the results as JSON, as report/results.json has them")
        if name == "repeat":
            command.add_argument("--seeds", type=at_least_one, default=3, metavar="N", help="runs of each variant (default 3)")
            command.add_argument(
                "--against",
                metavar="VARIANT",
                help="what the others are compared with (default: the best of those that read one modality)",
            )
            command.add_argument(
                "--missing",
                action="store_true",
                help="also score the models of all seeds against the share of rows that lack a modality: missing_seeds.json",
            )
        if name == "evaluate":
            command.add_argument(
                "--missing",
                action="store_true",
                help="also score each model against the share of rows that lack a modality: missing.json",
            )
            _add_scored_files(command)
    _add_predict(commands)
    add_commands(commands)
    _add_cluster(commands)
    _add_init(commands)
    command = commands.add_parser("fetch", help="write a public data set in a layout that the configs read")
    command.add_argument("names", nargs="+", choices=DATA_SETS, metavar="NAME", help=", ".join(DATA_SETS))
    command.add_argument("--out", required=True, type=filled, help="folder to write to")
    text = "a script with which your shell completes commands and options"
    command = commands.add_parser("completion", help=text, description=text)
    command.add_argument("shell", choices=SHELLS, help=", ".join(SHELLS))
    command = commands.add_parser("config", help="every key of a config with its default and meaning, or check a file")
    command.add_argument("config", nargs="?", metavar="CONFIG", help="check this file and print it with all defaults")
    _add_set(command)
    for own in commands.choices.values():
        _add_output(own)
    return parser


def _add_output(command: argparse.ArgumentParser) -> None:
    """How much is told; results go to standard output, all else to standard error."""
    group = command.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="nothing but the results, warnings and errors")
    group.add_argument("--verbose", action="store_true", help="also each epoch, and why a step is done again")
    group.add_argument("--debug", action="store_true", help="all there is, and tracebacks")


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "look at your data and write a config for it: what each column was taken for, and why"
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument("data", metavar="DATA", help="CSV, JSONL or Parquet file, folder (of them, or one per class), .tar")
    command.add_argument(
        "--target", action="append", default=[], metavar="COLUMN", help="what to predict; repeatable; of class folders their name"
    )
    command.add_argument("--out", default="run.yaml", metavar="FILE", help="config to write (default run.yaml)")
    command.add_argument("--classes", action="store_true", help="a target of numbers, or of many values, is a set of classes")
    command.add_argument("--force", action="store_true", help="replace the file if it is there")


def at_least_one(text: str) -> int:
    """A whole number of 1 or more. Raises: ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got '{text}'")
    return int(text)


def filled(text: str) -> str:
    """A text that is not blank. Raises: ArgumentTypeError."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _column_pair(text: str) -> tuple[str, str]:
    """`OURS=THEIRS` in two. Raises: ConfigError."""
    ours, _, theirs = (part.strip() for part in text.partition("="))
    if not ours or not theirs:
        raise ConfigError(f"--column takes OURS=THEIRS, a modality and what the files call it, got '{text}'")
    return ours, theirs


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one value of the config, e.g. training.epochs=5; repeatable",
    )


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What is asked before a large run, and how it is sent away."""
    texts = {
        "doctor": "what would stop a run: sources, columns, encoders, disk, nodes; ends with 1 if anything does",
        "plan": "hours, bytes and cost of a run over more samples or nodes than there are here, and what breaks first",
        "submit": "run a job on a cluster, follow its log and end with its exit code; with the same id again, follow it again",
    }
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for command in parsers.values():
        command.add_argument("config", metavar="CONFIG", help="YAML file; see jobs/configs/")
        _add_set(command)
    plan, submit = parsers["plan"], parsers["submit"]
    plan.add_argument("--samples", type=float, required=True, metavar="N", help="e.g. 1e9")
    plan.add_argument("--candidates", type=float, default=0, metavar="N", help="also search over so many")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    plan.add_argument("--cpus-per-node", type=int, metavar="C", help="cores of each (default: as this machine)")
    plan.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="default 0")
    plan.add_argument("--price-per-node-hour", type=float, metavar="P", help="in any currency")
    submit.add_argument("--address", required=True, help="the cluster's job server, e.g. http://10.0.0.1:8265")
    submit.add_argument("--command", choices=SUBMITTED, default="run", dest="job", help="what to run (default run)")
    submit.add_argument("--submission-id", metavar="ID", help="name of the job; the same again follows the same job")
    submit.add_argument("--no-wait", action="store_true", help="submit and leave")


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("predict", help="model folder + raw shards -> Parquet with probabilities per task")
    command.add_argument("model", metavar="MODEL", help="model folder, e.g. runs/openmoji/models/concat")
    command.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="raw shards (files, folders, globs); none: the sources that the model was trained with",
    )
    command.add_argument(
        "--out", required=True, type=filled, help="folder for predictions.parquet, rejects.parquet and the features on the way"
    )
    formats = ["parquet", "csv", "jsonl"]
    command.add_argument("--format", choices=formats, default="parquet", help="of the predictions (default parquet)")
    command.add_argument("--join", action="store_true", help="the input's columns before the predictions")
    command.add_argument(
        "--top-k", type=at_least_one, metavar="N", help="the N most probable classes of each task, with their probabilities"
    )
    command.add_argument("--wide", action="store_true", help="a column of probabilities for each class")
    _add_reading(command)
    _add_set(command)


def _add_scored_files(command: argparse.ArgumentParser) -> None:
    """`mmkt evaluate --model MODEL --data FILE... --out FOLDER`, instead of a config."""
    command.add_argument("--model", metavar="MODEL", help="score this model folder on --data, without a config")
    command.add_argument("--data", nargs="+", metavar="FILE", help="labelled raw shards (files, folders, globs)")
    command.add_argument("--out", metavar="FOLDER", type=filled, help="folder for metrics.json, predictions.parquet and more")
    _add_reading(command)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """How new raw shards are read, where that differs from training."""
    command.add_argument(
        "--like",
        type=int,
        default=0,
        metavar="N",
        help="read the inputs as the config's N-th source is read (default 0)",
    )
    command.add_argument(
        "--reader",
        choices=["parquet", "webdataset", "folders", "manifest"],
        help="layout of the inputs, if it differs from training",
    )
    command.add_argument(
        "--max-reject-frac",
        type=float,
        metavar="X",
        help="share of unreadable rows that is put up with, if not as in training",
    )
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="column mapping, if it differs from training; repeatable; of tables and vectors several with commas between",
    )
    command.add_argument(
        "--trust-code",
        action="store_true",
        help="import encoders that the model's card names as module:Class, and read files that it names outside of its folder",
    )


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
                status = _tell_error(error, args.debug)
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
    """End the Ray that the command has started, which takes a second or two: the prompt follows the result at once."""
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


def _tell_error(error: Exception, with_traceback: bool = False) -> int:
    """A sentence for what the user can mend, and for what is ours to mend; the exit status."""
    if with_traceback:
        traceback.print_exception(error)
    mendable = find_user_error(error)
    print(f"mmkt: {mendable or tell_unexpected(error)}", file=sys.stderr)
    return 2 if mendable else 1


_ADVICE_OF_RAY = re.compile(r"\nFailed to .{1,200} after \d+/\d+ attempts .*", re.DOTALL)


def tell_unexpected(error: Exception) -> str:
    """One sentence for what nobody foresaw: the innermost error, and the file that its traceback is written to."""
    seen: BaseException = error
    while inner := getattr(seen, "cause", None) or seen.__cause__:
        seen = inner
    text = _ADVICE_OF_RAY.sub("", str(seen)).strip().split("\n")[0][:500]
    handle, path = tempfile.mkstemp(prefix="mmkt-traceback-", suffix=".txt", text=True)
    with os.fdopen(handle, "w") as file:
        file.writelines(traceback.format_exception(error))
    return f"unexpected {type(seen).__name__}: {text}; the traceback is in {path}"


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError behind an exception, also where Ray has wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return UserError(_ADVICE_OF_RAY.sub("", str(getattr(seen, "cause", seen))))
        if type(seen).__name__ in ("OutOfDiskError", "ObjectStoreFullError"):  # of Ray, which is not imported for this
            return ResourceError(
                "Ray's object store and the disk that it spills to are full: free some space there and give the same "
                "command again"
            )
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    if isinstance(error, OSError):  # of a file, or of an object store that does not answer
        why = getattr(error, "cause", error)  # without Ray's traceback
        return ResourceError(f"cannot read or write: {why}; mend that and give the same command again")
    return None


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
    _start_ahead()
    from mmkt_ray import steps  # torch and ray load here, so that what does not need them is quick
    from mmkt_ray.done import run_folder
    from mmkt_ray.scoring.tables import comparison_table

    command = args.command
    if command == "run":
        return steps.run(config)
    if command == "search":
        return _search(config)
    stores = steps.extract_step(config, trains=command in ("train", "evaluate", "repeat"))
    if command in ("evaluate", "repeat", "transfer"):
        steps.check_test(stores)
    if command == "extract":
        return "\n".join(sorted({f"features: {store.uri}" for store in stores.values()}))
    if command == "scores":
        return steps.scores_step(config, stores)
    if command == "transfer":
        return steps.transfer_step(config, stores) + steps.refresh_report(config)
    if command == "repeat":
        table = steps.repeat_step(config, stores, args.seeds, args.against)
        if args.missing:
            table += "\n\n" + _missing_over_seeds(config, stores, args.seeds)
        return table + steps.refresh_report(config)
    steps.train_step(config, stores)
    if command == "train":
        return f"models: {run_folder(config)}/models"
    table = comparison_table(steps.evaluate_step(config, stores))
    return f"{table}\n\n{steps.missing_step(config, stores)}{steps.refresh_report(config)}" if args.missing else table


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
    _start_ahead(trains=False)
    from mmkt_ray.inference.output import Output
    from mmkt_ray.inference.prediction import predict

    output = Output(args.format, args.join, args.top_k, args.wide)
    return f"predictions: {predict(args.model, args.inputs, args.out, _reading(args), output)}"


def _score_files(args: argparse.Namespace) -> str:
    if not (args.model and args.data and args.out) or args.config or args.missing:
        raise ConfigError(
            "mmkt evaluate takes either CONFIG, to score the models of its run, or --model MODEL --data FILE... --out FOLDER, "
            "to score one model on labelled files"
        )
    _start_ahead(trains=False)
    from mmkt_ray.evaluation.scoring_files import score_files, scores_text

    result = score_files(args.model, args.data, args.out, _reading(args))
    return f"{scores_text(result)}\n\npredictions: {result.predictions}\nmetrics: {args.out}/metrics.json"


def _reading(args: argparse.Namespace) -> NewShards:
    from mmkt_ray.inference.prediction import NewShards

    columns = dict(_column_pair(text) for text in args.column)
    own = dict(parse_override(text) for text in args.overrides)
    return NewShards(args.like, args.reader, columns, args.max_reject_frac, own, args.trust_code)


def _config_help() -> str:
    lines = ["Every key of a config. (name) after a key: one of several choices; [] a list; .<name> a mapping.", ""]
    for key, default, text in describe_fields():
        lines.append(f"{key}  [{default}]" if default else key)
        lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
