from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.executor import execute
from moeconv.plan import Options, plan
from moeconv.selection import select_recipe
from tests.folders import CONFIG, experts_layout, pack_by_hand, read_folder, write_folder


def convert(source: Path, target: Path, layout: str, **options: object) -> None:
    checkpoint = open_checkpoint(source)
    made = plan(checkpoint, select_recipe(checkpoint), layout, Options(**options))  # type: ignore[arg-type]
    execute(made, target, ["test"])


@pytest.mark.parametrize("shards", [0, 1, 3, 7])
@pytest.mark.parametrize("max_shard_nbytes", [300, 2000, 10**9])
def test_pack_and_unpack_give_back_every_byte(tmp_path: Path, shards: int, max_shard_nbytes: int) -> None:
    tensors = experts_layout(experts=12)
    source = write_folder(tmp_path / "source", tensors, {**CONFIG, "num_experts": 12}, shards)
    convert(source, tmp_path / "packed", "packed", max_shard_nbytes=max_shard_nbytes)
    assert read_folder(tmp_path / "packed") == pack_by_hand(tensors)
    convert(tmp_path / "packed", tmp_path / "again", "experts", max_shard_nbytes=max_shard_nbytes)
    assert read_folder(tmp_path / "again") == tensors
