"""Speed, measured side by side on the same work in one run; medians with spread, hardware and commit, as JSON.

    python jobs/benchmark.py WHAT ..

    extract --data ../shared/data                  CIFAR-10 through the CNN: pipeline against a hand-tuned loop
    photos --rows 4000                             photos to 224 x 224 for an encoder that costs nothing: pipeline
                                                   against loops by hand; what isolating the decoder costs
    text --data ../shared/data                     TF-IDF fit and transform: pipeline and kernel against scikit-learn
    search --config jobs/configs/openmoji_search.yaml
                                                   candidates per hour: against Ray Tune, random search and TPE;
                                                   each once, for --seconds
    cnn --config jobs/configs/cifar10_20news.yaml --data ../shared/data
                                                   accuracy of that run's CNN itself on the test images
    suspects --config jobs/configs/openmoji.yaml   wrong labels and swapped texts, planted in a copy of the emoji: how
                                                   many the suspects name; --rounds plantings
    chaos --rounds 21                              processes killed, disks filled, nodes lost at random moments: what
                                                   the same command leaves afterwards
    together --rounds 20                           the same command twice at one folder: who is refused, what is left
    memory --rows 1000000                          peak memory of every process against samples and shards; --train:
                                                   of training, evaluation and prediction too
    plan --rows 40000                              an extraction on two and on three nodes: what `mmkt plan` says of
                                                   it, and what it takes

Each round runs every contender once, one after another, so that a machine that slows down slows all of them. Ratios
are taken round by round. Start-up (Ray's processes, imports, loading the encoder) is told apart from the steady rate.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from benchmark_chaos import measure_chaos
from benchmark_cnn import score_cnn
from benchmark_memory import draw_memory, measure_memory
from benchmark_photos import photo_contenders
from benchmark_plan import measure_plan
from benchmark_search import draw_curves, search_contenders  # beside this file
from benchmark_suspects import measure_suspects
from benchmark_together import measure_together
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer

from mmkt_ray import cluster
from mmkt_ray.config import Config, load_config, parse_config
from mmkt_ray.done import run_folder
from mmkt_ray.encoders.build import build_encoder, load_fitted, save_fitted
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.encoders.device import autocast
from mmkt_ray.features.extract import encode
from mmkt_ray.features.fit import fit_encoders
from mmkt_ray.features.store import Store
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from mmkt_ray.stages import hardware, read_commit
from mmkt_ray.steps import extract_step

Result = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["extract", "photos", "text", "cnn", "search", "suspects", "chaos", "together", "memory", "plan"]
    parser.add_argument("what", choices=known)
    parser.add_argument("--data", default="data", help="folder with cifar10/ and 20news-bydate.tar.gz")
    parser.add_argument(
        "--rounds", type=int, default=5, help="counted rounds, after one that is not; suspects: plantings"
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=4,
        help="text: how often the corpus is repeated, so that start-up is not all there is",
    )
    parser.add_argument("--limit", type=int, default=None, help="extract: rows of each shard")
    parser.add_argument(
        "--config", default="jobs/configs/openmoji_search.yaml", help="cnn, search, suspects: its config"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="search: time budget of each contender")
    parser.add_argument(
        "--faults",
        type=lambda names: names.split(","),
        default=None,
        help="chaos: some of them, e.g. 'driver,disk full'",
    )
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="memory: most samples of a case; plan, photos: samples"
    )
    parser.add_argument("--train", action="store_true", help="memory: also train, evaluate and predict")
    parser.add_argument("--case", default=None, help="memory: only cases whose name this expression matches")
    parser.add_argument("--out", default=None, help="write the JSON here as well")
    args = parser.parse_args()
    # these need none, or their runs bring their own
    if args.what not in ("cnn", "chaos", "together", "memory", "plan"):
        cluster.connect()
    with tempfile.TemporaryDirectory(prefix="mmkt-benchmark-") as folder:
        if args.what == "search":
            report = measure_search(args.config, args.seconds)
        elif args.what == "cnn":
            config = load_config(args.config, {"data_root": args.data})
            report = score_cnn(config, run_folder(config))
        elif args.what == "suspects":
            report = measure_suspects(args.config, args.rounds, Path(folder))
        elif args.what == "chaos":
            report = measure_chaos(args.rounds, args.faults)
        elif args.what == "together":
            report = measure_together(args.rounds)
        elif args.what == "memory":
            report = measure_memory(Path(folder), args.rows, args.train, args.case)
        elif args.what == "plan":
            report = measure_plan(Path(folder), args.rows)
        elif args.what == "photos":
            report = measure(photo_contenders(args.rows, Path(folder), pipeline), args.rounds)
        else:
            contenders = {"extract": extract_contenders, "text": text_contenders}[args.what](args, Path(folder))
            report = measure(contenders, args.rounds)
    report |= {
        "what": args.what,
        "arguments": vars(args),
        "hardware": f"{platform.processor() or platform.machine()}, {hardware()}",
        "commit": read_commit(),
    }
    text = json.dumps(report, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
        if args.what == "search":
            draw_curves(report["figures"], Path(args.out).with_suffix(".png"))
        if args.what == "memory":
            draw_memory(report["figures"], Path(args.out).with_suffix(".png"))
    print(report.get("table", text))
    return 0


def measure(contenders: dict[str, Callable[[], Result]], num_rounds: int) -> dict[str, Any]:
    """Run all contenders in turn, num_rounds + 1 times; the first round warms up and is not counted."""
    rounds: list[dict[str, Result]] = []
    for number in range(num_rounds + 1):
        rounds.append({name: run() for name, run in contenders.items()})
        print(f"round {number}: {rounds[-1]}", file=sys.stderr)
    counted = rounds[1:]
    first = next(iter(contenders))
    figures = {n: {k: spread([r[n][k] for r in counted]) for k in counted[0][n]} for n in contenders}
    ratios = {}
    for name in list(contenders)[1:]:
        for key in sorted(counted[0][name].keys() & counted[0][first].keys() & {"rows_per_s", "steady_rows_per_s"}):
            ratios[f"{name} / {first}, {key}"] = spread([r[name][key] / r[first][key] for r in counted])
    return {"rounds": num_rounds, "figures": figures, "ratios": ratios}


def measure_search(config_path: str, seconds: float) -> dict[str, Any]:
    """Each contender once, for the same time; features are extracted before, if they are not there."""
    config = load_config(config_path)
    store = extract_step(config.model_copy(update={"variants": {}}))["model"]
    figures = {}
    for name, run in search_contenders(config, store, seconds).items():
        figures[name] = run()
        print(name, {k: v for k, v in figures[name].items() if k != "curve"}, file=sys.stderr)
    ratios = {
        f"ours / {name}, per_hour": figures["ours"]["per_hour"] / f["per_hour"]
        for name, f in figures.items()
        if f["per_hour"]
    }
    return {"figures": figures, "ratios": ratios}


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


# --- CIFAR-10 through the CNN ---------------------------------------------------------------------------------------


def extract_contenders(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Result]]:
    """The loop and the pipeline, both with the same (untrained) network: speed does not depend on the weights."""
    config = parse_config(
        {
            "name": "benchmark",
            "data_root": str(Path(args.data).resolve()),
            "run_root": str(folder),
            "samples": {
                "sources": [
                    {
                        "reader": "parquet",
                        "path": "cifar10/train-*.parquet",
                        "split": "train",
                        "limit": args.limit,
                        "columns": {"image": "img", "object": "label"},
                    }
                ]
            },
            "modalities": {"image": {"kind": "image", "encoder": {"name": "cnn", "pretrain": "object"}}},
            "tasks": {"object": {}},
        }
    )
    section = config.modalities["image"].encoder
    encoder: Any = build_encoder(section)
    torch.manual_seed(0)
    encoder.adopt(SmallCNN(10, width=encoder.config.width), [str(i) for i in range(10)])
    uri = str(folder / "encoder")
    save_fitted(encoder, section, uri)
    shards = [shard.uri for shard in list_shards(ReadingPlan.of(config))]
    return {
        "loop": lambda: loop_extract(config, shards, uri, folder / "loop"),
        "pipeline": lambda: pipeline(config, {"image": uri}, folder),
    }


def loop_extract(config: Config, shards: list[str], uri: str, folder: Path) -> Result:
    """What one would write by hand for one process: read, decode, encode in large bf16 batches on all cores,
    write."""
    start = time.perf_counter()
    encoder: Any = load_fitted(build_encoder(config.modalities["image"].encoder), uri)
    torch.set_num_threads(cluster.cores())
    cluster.keep_freed_memory()
    seconds = {"start": time.perf_counter() - start, "read": 0.0, "decode": 0.0, "encode": 0.0, "write": 0.0}
    num_rows = 0
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), autocast(torch.device("cpu"), "bf16"):
        for path in shards:
            mark = time.perf_counter()
            limit = config.samples.sources[0].limit
            table = pq.read_table(path).slice(0, limit)
            data = table.column("img").combine_chunks().field("bytes").to_pylist()
            mark = _lap(seconds, "read", mark)
            images = np.stack([decode_by_hand(d) for d in data]).transpose(0, 3, 1, 2)
            mark = _lap(seconds, "decode", mark)
            batches = torch.from_numpy(images).split(512)
            features = torch.cat([encoder.model.features(batch) for batch in batches]).float().numpy()
            mark = _lap(seconds, "encode", mark)
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
            ids = pa.array([f"{path}#{i}" for i in range(len(data))])
            out = pa.table(
                {"sample_id": ids, "image_features": column, "object": table.column("label").cast(pa.string())}
            )
            pq.write_table(out, folder / Path(path).name, compression="zstd", compression_level=1, use_dictionary=False)
            _lap(seconds, "write", mark)
            num_rows += len(data)
    wall = time.perf_counter() - start
    rates = {"rows_per_s": num_rows / wall, "steady_rows_per_s": num_rows / (wall - seconds["start"])}
    return rates | {f"{k}_s": v for k, v in seconds.items()} | {"wall_s": wall}


def decode_by_hand(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of a JPEG, or of a PNG as `mmkt fetch cifar10` writes them."""
    if simplejpeg.is_jpeg(data):
        return np.asarray(simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _lap(seconds: dict[str, float], name: str, mark: float) -> float:
    now = time.perf_counter()
    seconds[name] += now - mark
    return now


def pipeline(config: Config, encoders: dict[str, str], folder: Path) -> Result:
    """The product: shards to a published store, from nothing."""
    shutil.rmtree(folder / "features", ignore_errors=True)
    start = time.perf_counter()
    store: Store = encode(config, str(folder), list_shards(ReadingPlan.of(config)), encoders)
    wall = time.perf_counter() - start
    counts, speed = store.manifest.counts, store.manifest.speed
    assert speed is not None
    num_rows = counts.rows + counts.rejects
    rates = {"rows_per_s": num_rows / wall, "steady_rows_per_s": num_rows / (wall - speed.startup_s)}
    return (
        rates
        | {f"{k.replace(' ', '_')}_s": v for k, v in speed.stages.items()}
        | {"start_s": speed.startup_s, "publish_s": wall - speed.wall_s, "wall_s": wall}
    )


# --- TF-IDF ---------------------------------------------------------------------------------------------------------


def text_contenders(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Result]]:
    """scikit-learn, our encoder in one process on one core, and the pipeline, on the same texts."""
    texts = read_posts(Path(args.data) / "20news-bydate.tar.gz") * args.copies
    (folder / "texts").mkdir()
    size = -(-len(texts) // 8)
    for number in range(8):
        part = texts[number * size : (number + 1) * size]
        pq.write_table(
            pa.table({"text": pa.array(part, pa.large_string())}),
            folder / "texts" / f"{number}.parquet",
            row_group_size=2048,
        )
    source = {
        "reader": "parquet",
        "path": "texts/*.parquet",
        "split": "train",
        "columns": {"text": "text", "label": "text"},
    }
    config = parse_config(
        {
            "name": "benchmark",
            "data_root": str(folder),
            "samples": {"sources": [source]},
            "modalities": {"text": {"kind": "text", "encoder": "tfidf"}},
            "tasks": {"label": {}},
        }
    )
    source_of = config.samples.sources[0].model_copy(update={"columns": {"text": "text"}})
    config = config.model_copy(
        update={"tasks": {}, "samples": config.samples.model_copy(update={"sources": (source_of,)})}
    )
    return {
        "scikit-learn": lambda: sklearn_tfidf(texts),
        "one core": lambda: one_core_tfidf(config, texts),
        "pipeline": lambda: pipeline_tfidf(config, folder),
    }


def read_posts(path: Path) -> list[str]:
    """The train posts, as latin-1."""
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isfile() and "-train/" in m.name]
        files = (archive.extractfile(m) for m in members)
        return [f.read().decode("latin-1") for f in files if f is not None]


def sklearn_tfidf(texts: list[str]) -> Result:
    """`fit`, then `transform`, as our pipeline has to do it over shards."""
    vectorizer = TfidfVectorizer(dtype=np.float32)
    start = time.perf_counter()
    vectorizer.fit(texts)
    fitted = time.perf_counter()
    vectorizer.transform(texts)
    end = time.perf_counter()
    return {
        "fit_s": fitted - start,
        "transform_s": end - fitted,
        "wall_s": end - start,
        "rows_per_s": len(texts) / (end - start),
    } | {"steady_rows_per_s": len(texts) / (end - start)}


def one_core_tfidf(config: Config, texts: list[str]) -> Result:
    """Our encoder, chunk by chunk in this process, nothing read or written."""
    encoder: Any = build_encoder(config.modalities["text"].encoder)
    chunks = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
    start = time.perf_counter()
    total = encoder.partial(chunks[0])
    for chunk in chunks[1:]:
        total = encoder.merge([total, encoder.partial(chunk)])
    encoder.finish(total)
    fitted = time.perf_counter()
    for chunk in chunks:
        encoder.encode(chunk)
    end = time.perf_counter()
    rate = len(texts) / (end - start)
    return {
        "fit_s": fitted - start,
        "transform_s": end - fitted,
        "wall_s": end - start,
        "rows_per_s": rate,
        "steady_rows_per_s": rate,
    }


def pipeline_tfidf(config: Config, folder: Path) -> Result:
    """Fit over the shards, then encode them into a store; reading and writing included."""
    shutil.rmtree(folder / "encoders", ignore_errors=True)
    start = time.perf_counter()
    encoders = fit_encoders(config, str(folder), list_shards(ReadingPlan.of(config)))
    fit_s = time.perf_counter() - start
    result = pipeline(config, encoders, folder)
    num_rows = result["rows_per_s"] * result["wall_s"]
    wall = fit_s + result["wall_s"]
    return (
        result
        | {"fit_s": fit_s, "transform_s": result["wall_s"], "wall_s": wall, "rows_per_s": num_rows / wall}
        | {"steady_rows_per_s": num_rows / (wall - result["start_s"])}
    )


if __name__ == "__main__":
    sys.exit(main())
