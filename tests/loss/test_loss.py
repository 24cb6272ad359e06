"""A trained model stays as good as it was, in every format: losses on held-out text against those of the BF16 source.

Training takes several minutes, so these tests run by `make test-loss` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from examples import loss
from examples.loss import Measured, Variant, difference
from tests.test_target import summed_error

pytestmark = pytest.mark.loss

VARIANTS = tuple(loss.variants())
#: Most nats a byte that a format may cost, by the bits that it spends on a weight at least. So small a model forgives
#: much, rounding to 2 bits costs it 0.02: limits are about three times what was measured, which such damage exceeds.
LIMITS = {8: 0.003, 4: 0.006}


@pytest.fixture(scope="session")
def source() -> Path:
    return loss.trained()


@pytest.fixture(scope="session")
def plain(source: Path) -> Tensor:
    return loss.losses(loss.load(source))


@pytest.fixture(scope="session")
def measured(source: Path) -> Callable[[Variant], Measured]:
    return cache(lambda variant: loss.measure(variant, source))


def limit(bits: float) -> float:
    return next(most for least, most in LIMITS.items() if bits >= least)


def test_the_model_has_learnt_what_no_count_of_bytes_tells(plain: Tensor) -> None:
    assert plain.mean() < loss.unigram_entropy() - 1


def test_every_expert_is_used(source: Path) -> None:
    shares = loss.expert_shares(loss.load(source))
    assert shares.min() > 0.2 / shares.shape[1]


@pytest.mark.parametrize("about", loss.MIXED_UP)
def test_experts_that_are_mixed_up_would_not_pass(source: Path, plain: Tensor, about: str) -> None:
    assert difference(loss.losses(loss.damaged(source, loss.MIXED_UP[about])), plain)[0] > 10 * LIMITS[4]


@pytest.mark.parametrize("about", loss.WRONG_VALUES)
def test_experts_with_wrong_values_would_not_pass(source: Path, plain: Tensor, about: str) -> None:
    assert difference(loss.losses(loss.damaged(source, loss.WRONG_VALUES[about])), plain)[0] > LIMITS[4]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_format_costs_little(plain: Tensor, measured: Callable[[Variant], Measured], variant: Variant) -> None:
    found = measured(variant)
    assert not found.losses.equal(plain), "nothing was quantized"
    assert difference(found.losses, plain)[0] < limit(found.bits)
    if found.read_losses is not None:
        assert difference(found.read_losses, plain)[0] < limit(found.bits)


def test_transformers_has_read_the_formats_that_it_knows(measured: Callable[[Variant], Measured]) -> None:
    read = {variant.name for variant in VARIANTS if measured(variant).read_losses is not None}
    assert read >= {"fp8", "fp8_dynamic", "w4a16", "w8a16"}


@pytest.mark.parametrize("searched", [v for v in VARIANTS if "--scale" in v.options], ids=str)
def test_searching_for_scales_costs_no_quality(measured: Callable[[Variant], Measured], searched: Variant) -> None:
    """Beyond noise: of the windows, and of which weights happen to be rounded up."""
    at = searched.options.index("--scale")
    unsearched = Variant(searched.name, searched.options[:at] + searched.options[at + 2 :])
    more, error = difference(measured(searched).losses, measured(unsearched).losses)
    assert more < max(2 * error, limit(measured(searched).bits) / 10)


def folder_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "moeconv.json")


def test_formats_chosen_for_a_size_lose_no_more_than_one_format_for_all(
    source: Path, plain: Tensor, measured: Callable[[Variant], Measured], tmp_path: Path
) -> None:
    """Of those that fit; summed errors exactly, losses beyond their noise, and less of both for two sizes of three."""
    uniform = {}
    for name in loss.TARGET_FORMATS:
        loss.moeconv("quantize", source, tmp_path / name, "--format", name)
        uniform[name] = summed_error(source, tmp_path / name), folder_nbytes(tmp_path / name), measured(Variant(name))
    better = 0
    for share in loss.TARGETS:
        losses, target, made = loss.measure_target(share, source)
        assert folder_nbytes(made) <= target
        error = summed_error(source, made)
        fitting = [found for found in uniform.values() if found[1] <= target]
        assert fitting
        is_better = True
        for other_error, _, other in fitting:
            more, noise = difference(losses, other.losses)
            assert error <= other_error
            assert more < 2 * noise
            is_better &= error < other_error and more < 0
        better += is_better
    assert better >= 2
