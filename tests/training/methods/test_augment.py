"""Augmentation against the plain formula on dense matrices."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmkt_ray.config import AugmentConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.models import SparseBatch
from mmkt_ray.training.batches import Batch
from mmkt_ray.training.methods.augment import augment_batch, check_augment, drop_terms, mix_features, mix_rows
from tests.labels import coded


def sparse_batch(num_rows=40, dim=60):
    matrix = sp.random(num_rows, dim, 0.2, "csr", np.float32, np.random.default_rng(0))
    matrix = sp.csr_matrix(matrix.multiply(np.arange(num_rows)[:, None] != 3))  # one row without terms
    matrix.eliminate_zeros()
    return SparseBatch(
        *(torch.from_numpy(x) for x in (matrix.indices.astype(int), matrix.indptr.astype(int), matrix.data))
    )


def as_dense(x, dim=60):
    rows = torch.repeat_interleave(torch.arange(len(x.offsets) - 1), x.offsets.diff())
    return torch.zeros(len(x.offsets) - 1, dim).index_put((rows, x.indices), x.values, accumulate=True)


def make_batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(40, 5, generator=generator)
    present = {"image": torch.rand(40, generator=generator) < 0.7, "text": torch.rand(40, generator=generator) < 0.7}
    labels = coded({"topic": torch.randint(-1, 3, (40,), generator=generator)})
    return Batch({"image": image, "text": sparse_batch()}, present, labels, present, labels)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_dropped_terms_leave_the_length_of_the_row():
    """Catches another share than asked for, rows that shrink (as if the text were shorter),
    and rows that lose everything."""
    x = sparse_batch()
    y = drop_terms(x, 0.4)
    before, after = as_dense(x), as_dense(y)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert (y.values == 0).float().mean() == pytest.approx(0.4, abs=0.06)
    ratio = torch.where(after != 0, after / before.clamp(min=1e-9), torch.nan)
    assert ((ratio - ratio.nanmean(dim=1, keepdim=True)).abs() < 1e-4)[after != 0].all(), "one factor per row"
    torch.testing.assert_close(as_dense(drop_terms(x, 0.999)).norm(dim=1), before.norm(dim=1))


def test_noise_is_as_large_as_the_features_spread():
    """Catches noise of one size for features of all sizes."""
    stds = torch.tensor([0.1, 1.0, 10.0])
    there = torch.ones(20_000, dtype=torch.bool)
    batch = Batch({"image": torch.zeros(20_000, 3)}, {"image": there}, {}, {"image": there}, {})
    noisy = augment_batch(batch, AugmentConfig(noise=0.5), {"image": stds}).features["image"]
    torch.testing.assert_close(noisy.std(dim=0) / stds, torch.full((3,), 0.5), atol=0.02, rtol=0)


def test_mixed_features_are_the_convex_combination():
    """Catches sparse rows joined with the wrong partner, or weighted the wrong way round."""
    x, generator = sparse_batch(), torch.Generator().manual_seed(1)
    partner, share = torch.randperm(40, generator=generator), torch.rand(40, generator=generator)
    expected = torch.lerp(as_dense(x), as_dense(x)[partner], share[:, None])
    torch.testing.assert_close(as_dense(mix_features(x, partner, share)), expected)
    torch.testing.assert_close(mix_features(as_dense(x), partner, share), expected)


def test_rows_are_mixed_with_partners_that_have_all_they_have():
    """Catches a row mixed with the zeros of an absent modality,
    and modalities of one row mixed by different shares."""
    batch = make_batch()
    mixed = mix_rows(batch, 1.0)
    assert mixed.present is batch.present
    share, image = mixed.mixed.share, batch.features["image"]
    moved = torch.where(share > 0)[0]
    assert 5 < len(moved) < 40
    partner = [
        next(
            j for j in range(40) if torch.allclose(torch.lerp(image[i], image[j], share[i]), mixed.features["image"][i])
        )
        for i in moved
    ]
    text = as_dense(batch.features["text"])
    torch.testing.assert_close(
        as_dense(mixed.features["text"])[moved], torch.lerp(text[moved], text[partner], share[moved][:, None])
    )
    for there in batch.present.values():
        assert (there[partner] | ~there[moved]).all()
    assert mixed.mixed.labels["topic"][moved].same_as(batch.labels["topic"][partner])
    assert (~batch.labels["topic"].labelled).any()


def test_nothing_asked_for_changes_nothing():
    """Catches an augmentation that is on by default, or that draws random numbers and so changes a run without it."""
    batch, before = make_batch(), torch.get_rng_state()
    same = augment_batch(batch, AugmentConfig(), {"image": torch.ones(5)})
    assert same.features["image"] is batch.features["image"]
    assert same.features["text"] is batch.features["text"]
    assert same.mixed is None
    assert torch.equal(torch.get_rng_state(), before)


def test_an_augmentation_without_features_to_act_on_is_refused():
    """Catches word dropout that silently does nothing because the text was reduced to dense features."""
    check_augment(AugmentConfig(word_dropout=0.1, noise=0.1), {"image": False, "text": True})
    with pytest.raises(ConfigError, match=r"word_dropout acts on sparse .* image, text are dense"):
        check_augment(AugmentConfig(word_dropout=0.1), {"image": False, "text": False})
    with pytest.raises(ConfigError, match="noise acts on dense"):
        check_augment(AugmentConfig(noise=0.1), {"text": True})
