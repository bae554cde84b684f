"""Commands that take what a run left behind: `mmkt export`, `mmkt serve`, `mmkt compare`.
Loads nothing heavy by itself."""

from __future__ import annotations

import argparse

from mmkt_ray.errors import DataError
from mmkt_ray.lazy import uncollected

OUTWARD = ("export", "serve", "compare")


def port(text: str) -> int:
    """A port's number. Raises: ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got '{text}'")
    return int(text)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Their part of the command line."""
    command = commands.add_parser(
        "export", help="model folder -> one ONNX file or PyTorch archive, checked against mmkt predict"
    )
    command.add_argument("model", metavar="MODEL", help="model folder, e.g. runs/openmoji/models/concat")
    command.add_argument(
        "--to", choices=["onnx", "torch"], default="onnx", help="default onnx (needs the extra `export`)"
    )
    command.add_argument(
        "--out", metavar="FOLDER", help="local folder to write to (default exported/<name of the model>)"
    )
    _add_trust(command)
    command = commands.add_parser(
        "serve", help="model folder -> HTTP server with a page to try it (needs the extra `serve`)"
    )
    command.add_argument(
        "model", metavar="MODEL", help="model folder, or a run's folder: the model that its report recommends"
    )
    command.add_argument("--port", type=port, default=8000, help="default 8000; 0: any that is free")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    command.add_argument("--ray", action="store_true", help="on Ray Serve, with --replicas processes")
    command.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="with --ray: models that answer (default 1)"
    )
    command.add_argument("--max-body-mb", type=float, default=20, metavar="MB", help="largest request (default 20)")
    command.add_argument("--timeout-s", type=float, default=30, metavar="S", help="longest answer (default 30)")
    _add_trust(command)
    command = commands.add_parser("compare", help="runs side by side, with paired tests on the rows that they share")
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="run or model folders; the others are held against the first"
    )
    command.add_argument("--html", metavar="FILE", help="also write the tables as a page")


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-code", action="store_true", help="import encoders that the model's card names as module:Class"
    )


def run_command(args: argparse.Namespace) -> str:
    """Do it; returns what is printed at the end."""
    if args.command == "export":
        with uncollected(freeze=True):
            from mmkt_ray.export import export_model

        return str(export_model(args.model, args.to, args.out, trust_code=args.trust_code))
    if args.command == "serve":
        return _serve(args)
    if len(args.runs) < 2:
        raise DataError("mmkt compare takes at least two folders: the others are held against the first")
    with uncollected(freeze=True):
        from mmkt_ray.report.compared_runs import compare_runs

    return compare_runs(args.runs, args.html)


def _serve(args: argparse.Namespace) -> str:
    with uncollected(freeze=True):
        from mmkt_ray.serve.server import require_serve, serve, serve_on_ray

    require_serve()
    from mmkt_ray.serve.limits import ServerLimits

    limits = ServerLimits(int(args.max_body_mb * 1e6), args.timeout_s)
    if args.ray:
        serve_on_ray(args.model, args.host, args.port, limits, args.replicas, trust_code=args.trust_code)
    else:
        serve(args.model, args.host, args.port, limits, trust_code=args.trust_code)
    return "the server has ended"
