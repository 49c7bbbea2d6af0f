"""The digits and their domains: real, bounded, reproducible, and different from each other."""

from __future__ import annotations

import numpy as np
import pytest

from orthomerge.demo.data import CLEAN, DOMAINS, Digits, Split, in_domain, load_digits
from orthomerge.errors import UnknownNameError


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(seed=0)


def test_the_split_keeps_every_digit_once(digits: Digits) -> None:
    assert (len(digits.train), len(digits.test)) == (1257, 540)
    assert digits.train.images.shape == (1257, 8, 8)
    ink = digits.train.images.sum(dtype=np.float64) + digits.test.images.sum(dtype=np.float64)
    assert ink == 561718 / 16  # the data set's pixel sum


def test_the_split_is_stratified_and_seeded(digits: Digits) -> None:
    counts = np.bincount(digits.test.labels, minlength=10)
    assert counts.min() >= 52
    assert counts.max() <= 55
    again, other = load_digits(seed=0), load_digits(seed=1)
    np.testing.assert_array_equal(again.test.images, digits.test.images)
    assert not np.array_equal(other.test.images, digits.test.images)


@pytest.mark.parametrize("domain", [CLEAN, *DOMAINS])
def test_a_domain_keeps_shape_type_and_range(domain: str, digits: Digits) -> None:
    before = digits.test.images.copy()
    seen = in_domain(digits.test, domain, seed=0, part="test")
    assert seen.images.shape == digits.test.images.shape
    assert seen.images.dtype == np.float32
    assert seen.images.flags.c_contiguous
    assert 0.0 <= seen.images.min() <= seen.images.max() <= 1.0
    np.testing.assert_array_equal(seen.labels, digits.test.labels)
    np.testing.assert_array_equal(digits.test.images, before)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_is_reproducible_and_far_from_clean(domain: str, digits: Digits) -> None:
    first = in_domain(digits.test, domain, seed=0, part="test").images
    second = in_domain(digits.test, domain, seed=0, part="test").images
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - digits.test.images).mean() > 0.05


def test_domains_differ_from_each_other(digits: Digits) -> None:
    views = [in_domain(digits.test, name, seed=0, part="test").images for name in DOMAINS]
    for index, one in enumerate(views):
        for other in views[index + 1 :]:
            assert np.abs(one - other).mean() > 0.05


def test_noise_is_not_shared_between_seeds_parts_and_draws(digits: Digits) -> None:
    split = Split(digits.test.images[:5], digits.test.labels[:5])
    noise = in_domain(split, "noisy", seed=0, part="train", draws=2)
    assert len(noise) == 10
    np.testing.assert_array_equal(noise.labels, np.tile(split.labels, 2))
    assert not np.array_equal(noise.images[:5], noise.images[5:])
    for other in (
        in_domain(split, "noisy", seed=0, part="test"),
        in_domain(split, "noisy", seed=1, part="train"),
    ):
        assert not np.array_equal(other.images, noise.images[:5])


def test_each_domain_does_what_its_name_says() -> None:
    image = np.zeros((1, 8, 8), dtype=np.float32)
    image[0, 1, 2] = 0.9
    split = Split(image, np.array([3]))

    def view(domain: str) -> np.ndarray:
        return in_domain(split, domain, seed=0, part="test").images[0]

    assert view("mirrored")[1, 5] == image[0, 1, 2]
    assert view("dead-lines").sum() == 0.0
    blurred = view("blurred")
    np.testing.assert_allclose(blurred[0:3, 1:4], 0.1, rtol=1e-6)
    np.testing.assert_allclose(blurred.sum(), 0.9, rtol=1e-6)


def test_an_unknown_domain_is_refused(digits: Digits) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mirrored'"):
        in_domain(digits.test, "mirored", seed=0, part="test")
