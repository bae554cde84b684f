"""Fitted states on disk: what was saved is what is used, and damage is told before compiled code sees it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmkt_ray.encoders import build
from mmkt_ray.encoders.build import build_encoder, build_reducer, load_fitted, save_fitted
from mmkt_ray.encoders.catalog import REDUCERS
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.encoders.image import CnnImageEncoder
from mmkt_ray.encoders.text import TfidfEncoder
from mmkt_ray.errors import DataError

TEXTS = ["a red car", "the blue cat", "no car at all"]


def tfidf(folder: Path, **options) -> TfidfEncoder.Section:
    """A fitted encoder in a folder; returns its section."""
    section = TfidfEncoder.Section(**options)
    encoder = build_encoder(section)
    encoder.finish(encoder.partial(TEXTS))
    save_fitted(encoder, section, str(folder))
    return section


def forge(folder: Path, **tensors: np.ndarray) -> None:
    """Other tensors with the fingerprint that belongs to them, as somebody would who means harm."""
    path = folder / "state.safetensors"
    state = load_file(path) | tensors
    card = json.loads((folder / "encoder.json").read_text())
    save_file(state, path)
    made_by = (card["config"], card["version"], card["rest"])
    (folder / "encoder.json").write_text(json.dumps(card | {"fingerprint": build._fingerprint(*made_by, state)}))


@pytest.mark.slow
def test_a_flipped_bit_is_found(tmp_path):
    """A term or a weight that is read as another one: other features, in silence."""
    section = tfidf(tmp_path)
    for name, position in (("state.safetensors", -1), ("state.safetensors", -30), ("encoder.json", -40)):
        data = bytearray((tmp_path / name).read_bytes())
        data[position] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            load_fitted(build_encoder(section), str(tmp_path))
        data[position] ^= 1
        (tmp_path / name).write_bytes(data)
    assert load_fitted(build_encoder(section), str(tmp_path)).encode(TEXTS).nnz > 3


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
@pytest.mark.parametrize(
    "state",
    [
        lambda s: {"term_offsets": s["term_offsets"] + 10**15},  # a segmentation fault where it is followed
        lambda s: {"term_offsets": s["term_offsets"][::-1].copy()},
        lambda s: {"term_offsets": s["term_offsets"].astype(np.int32)},
        lambda s: {"term_offsets": s["term_offsets"][:0]},
        lambda s: {"term_bytes": s["term_bytes"][:-3]},
        lambda s: {"term_bytes": s["term_bytes"] | 0x80},
        lambda s: {"idf": s["idf"][:1]},  # columns beyond the end
        lambda s: {"idf": np.full_like(s["idf"], np.nan)},
    ],
)
def test_a_vocabulary_is_checked_before_it_is_used(tmp_path, ngrams, state):
    """Offsets that have compiled code read and write anywhere, and lengths that do not agree."""
    section = tfidf(tmp_path, ngram_range=ngrams)
    forge(tmp_path, **state(load_file(tmp_path / "state.safetensors")))
    with pytest.raises(DataError, match="damaged"):
        load_fitted(build_encoder(section), str(tmp_path))


@pytest.mark.parametrize("name", ["pca", "svd", "standardize"])
def test_a_reducer_is_checked_before_it_is_used(tmp_path, name):
    """Components of another width, or infinite ones, that give other features or a traceback."""
    section = REDUCERS[name].Section(dim=None if name == "standardize" else 3)
    reducer = build_reducer(section)
    reducer.finish(reducer.partial(np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)))
    save_fitted(reducer, section, str(tmp_path))
    load_fitted(build_reducer(section), str(tmp_path))
    whole = load_file(tmp_path / "state.safetensors")
    for key, value in whole.items():
        for wrong in (value[:-1], np.full_like(value, np.inf), value.astype(np.int32)):
            if key != "components" or wrong.dtype != value.dtype or np.isinf(wrong).all() or name == "pca":
                forge(tmp_path, **{key: wrong})
                with pytest.raises(DataError, match="damaged"):
                    load_fitted(build_reducer(section), str(tmp_path))
                forge(tmp_path, **whole)


@pytest.mark.timeout(30)
def test_a_network_takes_no_more_memory_than_its_state(tmp_path):
    """A width of 10^6 in a card of a few bytes: 10^14 bytes for the network before it is compared with its
    weights."""
    section = CnnImageEncoder.Section(pretrain="colour", image_size=16, width=8)
    encoder = build_encoder(section)
    encoder.adopt(SmallCNN(num_classes=2, image_size=16, width=8), ["a", "b"])
    save_fitted(encoder, section, str(tmp_path))
    wide = section.model_copy(update={"width": 10**6})
    card = json.loads((tmp_path / "encoder.json").read_text())
    card |= {"dim": 4 * 10**6, "rest": card["rest"] | {"options": card["rest"]["options"] | {"width": 10**6}}}
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    forge(tmp_path)
    with pytest.raises(DataError, match=r"head\.weight has shape"):
        load_fitted(build_encoder(wide), str(tmp_path))


def test_another_version_of_an_encoder_is_told(tmp_path, monkeypatch):
    """Features of an older encoder, fitted before its `encode` was changed, taken for those of the new one."""
    section = tfidf(tmp_path)
    encoder = build_encoder(section)
    monkeypatch.setattr(type(encoder), "version", 2)
    with pytest.raises(DataError, match="version 1, this one is 2"):
        load_fitted(encoder, str(tmp_path))
