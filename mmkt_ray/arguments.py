"""The command line of `mmkt`: its commands and their options. Loads nothing heavy."""

from __future__ import annotations

import argparse

from mmkt_ray import __version__
from mmkt_ray.commands import add_commands
from mmkt_ray.completion import SHELLS
from mmkt_ray.submit import SUBMITTED

DESCRIPTION = """\
Multimodal knowledge transfer as batch processing on Ray:
what does each modality know, what transfers, which model to ship?

A run goes from raw shards to a report:  extract -> train -> evaluate -> report  (`mmkt run` does all four).
Every step is resumable: give the same command again, and what is done already is not done again.
"""
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
            command.add_argument(
                "--json", action="store_true", help="the results as JSON, as report/results.json has them"
            )
        if name == "repeat":
            command.add_argument(
                "--seeds", type=at_least_one, default=3, metavar="N", help="runs of each variant (default 3)"
            )
            command.add_argument(
                "--against",
                metavar="VARIANT",
                help="what the others are compared with (default: the best of those that read one modality)",
            )
            command.add_argument(
                "--missing",
                action="store_true",
                help="also score the models of all seeds against the share of rows that lack a modality: "
                "missing_seeds.json",
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
    """How much is printed; results go to standard output, all else to standard error."""
    group = command.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="nothing but the results, warnings and errors")
    group.add_argument("--verbose", action="store_true", help="also each epoch, and why a step is done again")
    group.add_argument("--debug", action="store_true", help="all there is, and tracebacks")


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "look at your data and write a config for it: what each column was taken for, and why"
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument(
        "data", metavar="DATA", help="CSV, JSONL or Parquet file, folder (of them, or one per class), .tar"
    )
    command.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="COLUMN",
        help="what to predict; repeatable; of class folders their name",
    )
    command.add_argument("--out", default="run.yaml", metavar="FILE", help="config to write (default run.yaml)")
    command.add_argument(
        "--classes", action="store_true", help="a target of numbers, or of many values, is a set of classes"
    )
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
        "plan": "hours, bytes and cost of a run over more samples or nodes than there are here, and what breaks "
        "first",
        "submit": "run a job on a cluster, follow its log and end with its exit code; with the same id again, follow "
        "it again",
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
        "--out",
        required=True,
        type=filled,
        help="folder for predictions.parquet, rejects.parquet and the features on the way",
    )
    formats = ["parquet", "csv", "jsonl"]
    command.add_argument("--format", choices=formats, default="parquet", help="of the predictions (default parquet)")
    command.add_argument("--join", action="store_true", help="the input's columns before the predictions")
    command.add_argument(
        "--top-k",
        type=at_least_one,
        metavar="N",
        help="the N most probable classes of each task, with their probabilities",
    )
    command.add_argument("--wide", action="store_true", help="a column of probabilities for each class")
    _add_reading(command)
    _add_set(command)


def _add_scored_files(command: argparse.ArgumentParser) -> None:
    """`mmkt evaluate --model MODEL --data FILE... --out FOLDER`, instead of a config."""
    command.add_argument("--model", metavar="MODEL", help="score this model folder on --data, without a config")
    command.add_argument("--data", nargs="+", metavar="FILE", help="labelled raw shards (files, folders, globs)")
    command.add_argument(
        "--out", metavar="FOLDER", type=filled, help="folder for metrics.json, predictions.parquet and more"
    )
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
        help="share of unreadable rows that is accepted, if not as in training",
    )
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="column mapping, if it differs from training; repeatable; of tables and vectors several with commas "
        "between",
    )
    command.add_argument(
        "--trust-code",
        action="store_true",
        help="import encoders that the model's card names as module:Class, and read files that it names outside of "
        "its folder",
    )
