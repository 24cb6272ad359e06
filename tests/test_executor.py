from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.executor import execute
from moeconv.plan import Options, plan
from moeconv.selection import select_recipe
from tests.folders import CONFIG, experts_layout, pack_by_hand, read_folder, tensor, write_folder


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


def test_layers_of_one_checkpoint_may_be_in_different_layouts(tmp_path: Path) -> None:
    """Main layers per expert, an MTP layer per expert under the next number, another MTP module packed."""
    main = experts_layout(layers=3)
    main["model.layers.2.eh_proj.weight"] = tensor((10, 20), seed="eh")
    main["model.layers.2.shared_head.norm.weight"] = tensor((10,), seed="head")
    mtp = {name.replace("model.layers.0", "mtp.layers.0"): item for name, item in experts_layout(layers=1).items()}
    mtp = {name: item for name, item in mtp.items() if name.startswith("mtp.")}
    packed_mtp = {f"mtp.{name[4:]}": item for name, item in pack_by_hand(mtp).items()}
    source = write_folder(tmp_path / "source", {**main, **packed_mtp}, CONFIG, 4)
    convert(source, tmp_path / "packed", "packed")
    assert read_folder(tmp_path / "packed") == {**pack_by_hand(main), **packed_mtp}
    convert(tmp_path / "packed", tmp_path / "experts", "experts")
    assert read_folder(tmp_path / "experts") == {**main, **mtp}


def test_mxfp4_blocks_scales_and_biases_move_together(tmp_path: Path) -> None:
    """Rows of gate and up alternate in blocks, scales and biases alike, and come back alike."""
    experts, inner, hidden = 11, 32, 64
    block = "model.layers.0.mlp.experts"
    packed = {
        f"{block}.gate_up_proj_blocks": tensor((experts, 2 * inner, hidden // 32, 16), "U8", "blocks"),
        f"{block}.gate_up_proj_scales": tensor((experts, 2 * inner, hidden // 32), "U8", "scales"),
        f"{block}.gate_up_proj_bias": tensor((experts, 2 * inner), "BF16", "bias"),
        f"{block}.down_proj_blocks": tensor((experts, hidden, inner // 32, 16), "U8", "down"),
        f"{block}.down_proj_scales": tensor((experts, hidden, inner // 32), "U8", "down scales"),
        f"{block}.down_proj_bias": tensor((experts, hidden), "BF16", "down bias"),
    }
    config = {
        "model_type": "gpt_oss",
        "num_local_experts": experts,
        "intermediate_size": inner,
        "hidden_size": hidden,
    }
    source = write_folder(tmp_path / "source", packed, config, 2)
    convert(source, tmp_path / "experts", "experts")
    made = read_folder(tmp_path / "experts")
    for suffix, kind in (("weight_blocks", "blocks"), ("weight_scales", "scales"), ("bias", "bias")):
        whole = packed[f"{block}.gate_up_proj_{kind}"].content
        row = len(whole) // (experts * 2 * inner)
        for number in range(experts * 2 * inner):
            expert, line = divmod(number, 2 * inner)
            part = made[f"{block}.{expert}.{('gate', 'up')[line % 2]}_proj.{suffix}"].content
            at = line // 2 * row
            assert part[at : at + row] == whole[number * row : (number + 1) * row]
    convert(tmp_path / "experts", tmp_path / "back", "hub")
    assert read_folder(tmp_path / "back") == packed
