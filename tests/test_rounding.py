"""What encoders lose, and what damaged matrices are off, against what `formats.rounding` says of each format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor

from moeconv.formats import FAMILY_FORMATS, FORMATS, Decoder, Format, StoredBnb4, make_format
from moeconv.formats.rounding import BLOCK, WHOLE, block_of, by_block, rounding_of, scales_of, unscaled

SHAPE = (256, 512)


def choices() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (_, options) in {**FORMATS, **FAMILY_FORMATS}.items():
        searches = options.get("search", ())
        yield from ((name, {"search": search}) for search in (searches if isinstance(searches, tuple) else ()))
        if "search" not in options:
            yield name, {}
        if "double_quant" in options:
            yield name, {"double_quant": True}
        if "group_size" in options:
            yield name, {"group_size": 32}


CHOICES = list(choices())
of_choices = pytest.mark.parametrize(("name", "options"), CHOICES, ids=lambda item: str(item))
KINDS = ("gaussian", "student", "uniform")


def matrix(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made: Tensor = torch.randn(SHAPE, generator=generator)
    if kind == "student":
        made = made / torch.randn((5, *SHAPE), generator=generator).square().mean(0).sqrt()
    if kind == "uniform":
        made = torch.rand(SHAPE, generator=generator) * 2 - 1
    return (made * 0.02).to(torch.bfloat16)


def encoded(made: Format, of: Tensor) -> tuple[Decoder, dict[str, Tensor]]:
    own = made.bound(SHAPE, "BF16")
    peak = own.joined([float(own.measured(of))]) if own.shares_scale else 0.0
    suffixes = [part.suffix for part in own.parts(SHAPE, "BF16") if part.rows]
    parts = dict(zip(suffixes, own.encode(of, peak), strict=True))
    nested = isinstance(own, StoredBnb4) and own.nested
    return (StoredBnb4(own.name, True, peak) if nested else own), parts


def ratios(made: Decoder, wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """How many times more is lost than expected: of the matrix, and of the block where it is most."""
    rounding, block = rounding_of(made, "BF16"), block_of(made, SHAPE)
    blocks, lost = by_block(wanted.float(), block).double(), by_block(found - wanted.float(), block).double()
    expected = rounding.relative**2 * blocks.square().sum(1)
    expected += rounding.step**2 * blocks.abs().amax(1).square() * blocks.shape[1]
    squares = lost.square().sum(1)
    return float((squares.sum() / expected.sum()).sqrt()), float((squares / expected).sqrt().max())


@of_choices
@pytest.mark.parametrize("kind", KINDS)
def test_encoders_lose_what_is_expected(name: str, options: dict[str, Any], kind: str) -> None:
    of = matrix(kind)
    made, parts = encoded(make_format(name, options), of)
    whole, block = ratios(made, of, made.decode(parts, SHAPE[1]))
    assert 0.6 < whole < 1.1 < WHOLE / 1.5
    assert block < 2.3 < BLOCK / 1.2


@of_choices
@pytest.mark.parametrize("kind", KINDS)
def test_few_codes_are_outermost(name: str, options: dict[str, Any], kind: str) -> None:
    made, parts = encoded(make_format(name, options), matrix(kind))
    largest = rounding_of(made, "BF16").largest
    if largest:
        codes = unscaled(made, parts, SHAPE[1]).abs()
        assert codes.max() <= largest * 8 / 7 * 1.001
        assert float((codes >= largest * 0.999).float().mean()) < 0.75 * rounding_of(made, "BF16").most_there


@of_choices
def test_other_matrices_are_far_off(name: str, options: dict[str, Any]) -> None:
    of = matrix("gaussian")
    made, parts = encoded(make_format(name, options), of)
    found = made.decode(parts, SHAPE[1])
    for wrong in (found.flip(0), -found, found * 2, found * 0.5, torch.zeros(SHAPE)):
        assert ratios(made, of, wrong)[0] > 1.5 * WHOLE


@of_choices
def test_one_scale_that_is_doubled_is_seen_in_its_block(name: str, options: dict[str, Any]) -> None:
    of = matrix("gaussian")
    made, parts = encoded(make_format(name, options), of)
    found = made.decode(parts, SHAPE[1])
    block = block_of(made, SHAPE)
    rows, columns = max(1, block.rows), block.columns
    for factor in (2.0, 0.5):
        wrong = found.clone()
        wrong[:rows, :columns] *= factor
        assert ratios(made, of, wrong)[1] > BLOCK


@of_choices
def test_scales_are_told_from_codes(name: str, options: dict[str, Any]) -> None:
    """What codes stand for, times the scales, is the matrix."""
    made, parts = encoded(make_format(name, options), matrix("gaussian"))
    assert all(bool(scales.isfinite().all()) and bool((scales != 0).all()) for scales in scales_of(parts))
    codes, found = unscaled(made, parts, SHAPE[1]), made.decode(parts, SHAPE[1])
    blocks, of_codes = by_block(found, block_of(made, SHAPE)), by_block(codes, block_of(made, SHAPE))
    factors = (blocks * of_codes).sum(1, keepdim=True) / of_codes.square().sum(1, keepdim=True)
    assert torch.allclose(blocks, of_codes * factors, rtol=1e-5, atol=1e-9)
