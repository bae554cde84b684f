"""A process that uses damaged and made-up model folders: `python -m tests.inference.fuzz_models COUNT FOLDER`.

Half of them are damaged: bits flipped, files cut, mixed up or gone. Such a folder is refused, or gives the right
answer. The others are forged: cards, encoder states and weights of any content, with the checksums that belong to it.
Such a folder is refused, or gives finite probabilities. Wrong is all else: any exception but a UserError, a crash,
code run, a file opened outside the folder, a file that is written, more than HANG_S seconds or GROWTH_BYTES of
memory. The folder that is being used lies in FOLDER/in: after a crash it is still there.
The last line of stdout counts the outcomes.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mmkt_ray import record, storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.encoders import build
from mmkt_ray.encoders.build import build_encoder, build_reducer, load_fitted, load_reducer, save_fitted
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.errors import UserError
from mmkt_ray.features.encode import encode_column
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import from_arrow
from mmkt_ray.inference.model_folder import load_model, save_calibration, save_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.prediction import check_finite, prediction_config, restrict, usable_encoders
from mmkt_ray.models import MultimodalModel, build_spec
from mmkt_ray.models.ensemble import EnsembleModel, EnsembleSpec
from mmkt_ray.models.expert_model import ExpertModel, ExpertSpec
from tests.configs import build_config, raw_config
from tests.manifests import make_manifest, make_training
from tests.samples.fuzz_worker import Watch, peak_bytes

GROWTH_BYTES = 300_000_000
ADDRESS_BYTES = 16_000_000_000
HANG_S = 30
RAN = "ran"  # what the code that a card names would leave

Files = dict[str, bytes]
Answer = tuple[dict[str, np.ndarray], dict[str, list[str]]]

TEXTS = ["a red car", "the blue cat", None, "no car, a cat: émigré", "", "x" * 500]
IMAGES = [None if i == 3 else np.random.default_rng(i).integers(0, 256, (20, 20 + i, 3), np.uint8) for i in range(6)]


# --- what is used --------------------


def answer(folder: Path) -> Answer:
    """What `mmkt predict` makes of six samples, but for the readers and Ray. Raises: UserError."""
    uri = str(folder)
    model, card = load_model(uri)
    config = prediction_config(restrict(parse_config(card.config), {}), ["new.parquet"], 0, None, {})
    folders = usable_encoders(uri, model, card, config, {}, trust_code=False)
    features, present = {}, {}
    for m, modality in config.modalities.items():
        encoder: Any = load_fitted(build_encoder(modality.encoder), folders[m][0])
        values: list[Any] = TEXTS if modality.kind.is_text else IMAGES
        if hasattr(encoder, "prepare"):
            values = [None if v is None else encoder.prepare(v) for v in values]
        column, _ = encode_column(encoder, values)
        features[m], present[m] = from_arrow(column, encoder.dim)
        for reducer in folders[m][1:]:
            features[m] = load_reducer(reducer).encode(features[m])
    ids = np.arange(len(TEXTS)).astype(str).astype(object)
    split = np.full(len(ids), "test", dtype=object)
    table = FeatureTable(ids, split, features, present, {}, card.class_names)
    return check_finite(predict_table(model, table)), {t: card.class_names[t] for t in model.spec.tasks}


def check_answer(found: Answer, right: Answer, forged: bool) -> str:
    """The outcome. A damaged folder must not answer anything else than the whole one."""
    (proba, names), (whole, whole_names) = found, right
    same = names == whole_names and proba.keys() == whole.keys()
    if same and all(np.array_equal(proba[t], whole[t]) for t in proba):
        return "the same"
    assert forged, "another answer, in silence"
    for t, values in proba.items():
        assert values.shape == (len(TEXTS), len(names[t])), (t, values.shape)
        assert ((values >= 0) & (values <= 1.0001)).all(), t
    return "another answer"


# --- whole folders --------------------


def make_config(root: Path, **overrides: Any) -> Config:
    """Images and texts, three tasks of all kinds."""
    tasks = {"thing": "multiclass", "warm": "binary", "tags": "multilabel"}
    return build_config(raw_config(tasks, data_root=str(root), model={"hidden_dim": 8}), **overrides)


def write_encoders(folder: Path, config: Config) -> dict[str, Any]:
    """Fitted encoders and reducers; the manifest's entries of the modalities."""
    entries = {}
    texts = [t for t in TEXTS if t]
    for m, section in config.modalities.items():
        encoder: Any = build_encoder(section.encoder)
        if section.encoder.name == "tfidf":
            encoder.finish(encoder.partial(texts))
        elif section.encoder.name == "cnn":
            torch.manual_seed(0)
            encoder.adopt(SmallCNN(2, image_size=16, width=8), ["a", "b"])
        cards = [save_fitted(encoder, section.encoder, str(folder / "encoders" / m))]
        if section.reduce is not None:
            values = texts if section.kind.is_text else [encoder.prepare(v) for v in IMAGES if v is not None]
            reducer = build_reducer(section.reduce)
            reducer.finish(reducer.partial(encoder.encode(values)))
            cards.append(save_fitted(reducer, section.reduce, str(folder / "encoders" / f"{m}-small")))
        prints = [card.fingerprint for card in cards]
        entries[m] = {
            "dim": cards[-1].dim,
            "sparse": cards[-1].sparse,
            "fingerprint": prints[0] if len(prints) == 1 else build.fingerprint(prints),
            "folders": [m, f"{m}-small"][: len(cards)],
        }
    return entries


def write_folder(folder: Path, config: Config, kind: str) -> None:
    """A model folder of random weights."""
    entries = write_encoders(folder, config)
    classes = {"thing": ["bird", "car", "cat"], "warm": ["no", "yes"], "tags": ["a", "b", "c", "d"]}
    dims, sparse = ({m: e[key] for m, e in entries.items()} for key in ("dim", "sparse"))
    counts = {t: len(names) for t, names in classes.items()}

    def new(own: Config) -> MultimodalModel:
        return MultimodalModel(build_spec(own, dims, sparse, counts))

    torch.manual_seed(1)
    model: Any = new(config)
    if kind == "ensemble":
        members = [model, new(config.with_overrides({"model.fusion": "gated"}))]
        model = EnsembleModel(EnsembleSpec(tuple(m.spec for m in members), (2, 1)), members)
    elif kind == "experts":
        expert = new(config.with_overrides({"model.modalities": ["text"]}))
        spec = ExpertSpec(model.spec, {"text": expert.spec}, {"thing": {"text": "text"}})
        model = ExpertModel(spec, model, {"text": expert})
    manifest = make_manifest(modalities=entries, tasks={t: {"classes": names} for t, names in classes.items()})
    save_model(str(folder), model.eval(), config, manifest, make_training())
    model.temperatures = {"thing": 1.5}
    save_calibration(str(folder), model)


SEEDS: dict[str, dict[str, Any]] = {
    "concat": {},
    "ensemble": {},
    "experts": {"modalities__text__encoder": {"name": "tfidf", "ngram_range": [1, 2]}},
    "cnn": {
        "modalities__image__encoder": {"name": "cnn", "pretrain": "thing", "image_size": 16, "width": 8},
        "modalities__text__reduce": {"name": "svd", "dim": 2},
        "model__sharing": "mmoe",
        "model__fusion": "attention",
    },
    "reduced": {
        "modalities__image__reduce": {"name": "pca", "dim": 3},
        "modalities__text__reduce": "standardize",
        "model__missing": "generate",
        "model__fusion": {"name": "hierarchical", "depth": 2, "fuse": "low_rank_bilinear"},
    },
}


def read_files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# --- damage --------------------


def damage(files: Files, others: list[Files], rng: random.Random) -> Files:
    """Some bits of a folder are not those that were written."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        name = rng.choice(sorted(files))
        data = bytearray(files[name])
        at = rng.randrange(len(data)) if data else 0
        how = rng.choice(["bit", "bit", "bit", "bytes", "cut", "more", "zeros", "gone", "swap", "other"])
        if how == "bit" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == "bytes":
            data[at : at + 8] = rng.randbytes(8)
        elif how == "cut":
            del data[at:]
        elif how == "more":
            data += rng.randbytes(rng.randrange(1, 50))
        elif how == "zeros":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif how == "swap":
            data = bytearray(files[rng.choice(sorted(files))])
        elif how == "other":
            data = bytearray(rng.choice(others).get(name, b""))
        files[name] = bytes(data)
        if how == "gone" and len(files) > 1:
            del files[name]
    return files


# --- forgery --------------------

SYSTEM = {"name": "os:system", "options": {"command": f"touch {RAN}"}}
NASTY: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        17,
        10**9,
        10**13,
        2**63,
        -(2**63),
        10**30,
        0.5,
        1e308,
        -1e-308,
        "",
        "os:system",
        "../../x",
    ),
    *(
        "/etc/passwd",
        "s3://no-such-bucket/x",
        "x" * 5000,
        "\0",
        "image",
        "text",
        [],
        {},
        [[]],
        ["image"],
        [0] * 1000,
        SYSTEM,
    ),
    *({"name": "huggingface", "folder": "/etc"}, {"name": "torchvision", "weights": "/dev/zero"}, {"name": "minilm"}),
    *({"name": "cnn", "pretrain": "thing", "width": 10**7}, {"name": "pca", "dim": 10**9}, "pixels", "tfidf"),
]


def spots(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, part in inside for p in spots(part, (*path, key)))]


def forge_json(value: Any, rng: random.Random) -> Any:
    """One thing in it is another one, is gone, or is there once more."""
    value = copy.deepcopy(value)
    *way, last = rng.choice([p for p in spots(value) if p])
    node = value
    for key in way:
        node = node[key]
    how = rng.choice(["set", "set", "set", "number", "gone", "more"])
    if how == "number" and isinstance(node[last], int | float) and not isinstance(node[last], bool):
        node[last] = rng.choice([node[last] + 1, node[last] * 2, -node[last], node[last] * 10**6, float(node[last])])
    elif how == "gone":
        del node[last]
    elif how == "more" and isinstance(node, dict):
        node[rng.choice(["x", "name", "folder", "options", "text", "../x"])] = rng.choice(NASTY)
    else:
        node[last] = rng.choice(NASTY)
    return value


def forge_tensors(data: bytes, rng: random.Random) -> bytes:
    """One tensor of the file has other values, another type, another shape, is gone, or there is one more."""
    tensors = load_tensors(data)
    if not tensors:
        return save_tensors({"x": np.zeros(3, np.float32)})
    name = rng.choice(sorted(tensors))
    value = tensors[name].copy()
    flat = value.reshape(-1)
    how = rng.choice(["values", "values", "all", "type", "shape", "cut", "gone", "more", "order"])
    if how == "values" and flat.size:
        extreme = (
            [np.nan, np.inf, 1e30, -1.0, 0.0] if value.dtype.kind == "f" else [0, 1, 2**62, -1, -(2**62), 255, 1 << 20]
        )
        for _ in range(rng.choice([1, 3])):
            with np.errstate(all="ignore"):
                flat[rng.randrange(flat.size)] = np.array(rng.choice(extreme)).astype(value.dtype)
    elif how == "all":
        value = (value * rng.choice([0, -1, 2, 100])).astype(value.dtype)
    elif how == "type":
        with np.errstate(all="ignore"):
            value = value.astype(rng.choice([np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_]))
    elif how == "shape":
        value = value.reshape(-1)[None] if value.ndim != 2 else value.T.copy()
    elif how == "cut":
        value = flat[: rng.randrange(flat.size + 1)].copy()
    elif how == "order":
        value = value[::-1].copy() if value.ndim else value
    tensors[name] = np.asarray(value)
    if how == "gone":
        del tensors[name]
    elif how == "more":
        tensors[name + "x"] = np.asarray(value)
    return save_tensors(tensors)


def forge(files: Files, others: list[Files], rng: random.Random) -> Files:
    """A folder that somebody made, all checksums right."""
    files = dict(files)
    name = rng.choice(sorted([*files, "config.json", "config.json"]))
    try:
        files[name] = (
            forge_tensors(files[name], rng) if name.endswith(".safetensors") else forged_card(files[name], rng)
        )
    except (ValueError, OverflowError):
        return files
    return resealed(files, keep_fingerprint=rng.random() < 0.1)


def forged_card(data: bytes, rng: random.Random) -> bytes:
    card = json.loads(data)
    if rng.random() < 0.1 and "spec" in card:  # a card of another kind of model
        card["config"]["modalities"]["text"]["encoder"] = SYSTEM
    return json.dumps(forge_json(card, rng)).encode()


def resealed(files: Files, keep_fingerprint: bool) -> Files:
    """With the fingerprints and checksums that belong to the content, as far as that is possible."""
    prints = {}
    for name in [n for n in files if n.endswith("encoder.json")]:
        folder = name.rsplit("/", 2)[1]
        try:
            card, tensors = (
                json.loads(files[name]),
                load_tensors(files[name.replace("encoder.json", "state.safetensors")]),
            )
            made_by = (card["config"], card["version"], card["rest"])
            card["fingerprint"] = prints[folder] = build._fingerprint(*made_by, tensors)
            files[name] = json.dumps(card).encode()
        except Exception:
            continue  # it has no fingerprint
    try:
        card = json.loads(files["config.json"])
        card["checksums"]["model.safetensors"] = storage.checksum(files["model.safetensors"])
        for entry in card["encoders"].values():
            own = [prints[f] for f in entry["folders"]]
            if not keep_fingerprint:
                entry["fingerprint"] = own[0] if len(own) == 1 else build.fingerprint(own)
    except Exception:
        pass
    if isinstance(card, dict):
        card.pop("checksum", None)
        files["config.json"] = json.dumps(card | {"checksum": record._seal(card)}).encode()
    return files


# --- the work --------------------


def main(count: int, folder: Path, first: int = 0) -> None:
    """Use so many folders; raises what is wrong with one of them."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    inside, outside, whole = folder / "in", folder / "outside", folder / "whole"
    outside.mkdir(parents=True)
    os.chdir(folder)
    seeds, right = {}, {}
    for kind, overrides in SEEDS.items():
        write_folder(whole / kind, make_config(folder, **overrides), kind)
        seeds[kind] = read_files(whole / kind)
        right[kind] = answer(whole / kind)
        write_files(inside, resealed(dict(seeds[kind]), keep_fingerprint=False))
        assert check_answer(answer(inside), right[kind], forged=False) == "the same"
    watch = Watch(outside)
    sys.addaudithook(watch.audit)
    outcomes: Counter[str] = Counter()
    peak = peak_bytes()
    for number in range(first, first + count):
        rng = random.Random(number)
        kind = rng.choice(sorted(seeds))
        change: Callable[..., Files] = (damage, forge)[number % 2]
        write_files(inside, change(seeds[kind], [seeds[k] for k in sorted(seeds)], rng))
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            with watch:
                outcome = use(inside, right[kind], forged=change is forge)
        except BaseException:
            print(f"folder number {number}, {kind}, {change.__name__}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        outcomes[f"{change.__name__}: {outcome}"] += 1
        assert not (folder / RAN).exists(), f"number {number} ran code"
        assert peak_bytes() - peak < GROWTH_BYTES, f"number {number}: {peak_bytes() - peak:,} bytes more than before"
    print(json.dumps({"outcomes": outcomes, "peak_growth_bytes": peak_bytes() - peak}))


def use(folder: Path, right: Answer, forged: bool) -> str:
    """The outcome of one folder."""
    try:
        found = answer(folder)
    except UserError:
        return "refused"
    return check_answer(found, right, forged)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
