"""The targets of `make fuzz` hold for their own seeds, and for inputs that Hypothesis makes of them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.run import TARGETS

#: What is put in place of a value, and where values are, in JSON and YAML alike.
VALUES = [
    b"null", b"true", b"-1", b"0", b"1e999", b'"x"', b'""', b"[]", b"{}", b"[[1]]", b"[null]", b'{"a": 1}', b'"4"',
    b"9" * 400, b"1" + b"0" * 4000, b"9223372036854775808", b'"\\ud800"', b'"\\udc80"', b"[" * 80 + b"]" * 80,
]  # fmt: skip
PLACES = re.compile(rb'"(?:[^"\\]|\\.)*"|\b\d+\b|null|true|false|\[[^\[\]]*\]|\{[^{}]*\}')
EXAMPLES = {"config": 40, "manifest": 50}


def target(name: str) -> Any:
    return importlib.import_module(f"tests.fuzz.fuzz_{name}")


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with values exchanged, and bytes changed, put in or left out."""
    made = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        places = [place.span() for place in PLACES.finditer(made)] or [(0, 0)]
        begin, end = draw(st.sampled_from(places))
        if draw(st.integers(0, 3)):
            new = draw(st.sampled_from(VALUES))
        else:
            begin = draw(st.integers(0, len(made)))
            end = begin + draw(st.integers(0, 2))
            new = draw(st.binary(max_size=3))
        made = made[:begin] + new + made[end:]
    return made


def test_every_target_is_run() -> None:
    assert {path.stem for path in (Path(__file__).parent / "fuzz").glob("fuzz_*.py")} == {f"fuzz_{n}" for n in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_its_seeds(name: str) -> None:
    seeds = list(target(name).seeds())
    assert len(seeds) > 1
    for seed in seeds:
        assert len(seed) <= target(name).MAX_LEN
        target(name).one_input(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_what_is_made_of_its_seeds(name: str) -> None:
    seeds = list(target(name).seeds())
    inputs = st.one_of(mutated(seeds), mutated(seeds), mutated(seeds), st.binary(max_size=200))

    @settings(
        max_examples=EXAMPLES.get(name, 300), deadline=None, database=None, suppress_health_check=list(HealthCheck),
        derandomize=True,
    )  # fmt: skip
    @given(inputs)
    def holds(content: bytes) -> None:
        target(name).one_input(content)

    holds()
