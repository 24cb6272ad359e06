import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import refused, run, succeeds
from tests.folders import CONFIG, Tensor, experts_layout, read_folder, tensor, write_file, write_folder

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"


def finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random bytes as numbers below 2 in magnitude: the first bit of the exponent is cleared."""
    made = {}
    for name, item in tensors.items():
        content = bytearray(item.content)
        size = {"BF16": 2, "F32": 4}[item.dtype]
        content[size - 1 :: size] = bytes(byte & 0xBF for byte in content[size - 1 :: size])
        made[name] = item._replace(content=bytes(content))
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", finite(experts_layout()), CONFIG, 3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def packed(source: Path) -> Path:
    """In several files, each with its own tensors."""
    succeeds("pack", source, source.parent / "packed", "--max-shard-size", "1kB")
    return source.parent / "packed"


def faults(made: Path, source: Path) -> str:
    """What `verify --against` says of a folder that is not what it should be; JSON says the same."""
    text = refused("verify", made, "--against", source, within=source.parent)
    result = run("verify", made, "--against", source, "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"], report["schema_version"]) == (1, False, 1)
    for problem in report["problems"]:
        assert problem["message"] in text
        assert problem["remedy"] in text
    return text


def file_of(made: Path, name: str) -> tuple[Path, int, int]:
    """File of a tensor, and where its bytes begin and end there."""
    for path in sorted(made.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entry = json.loads(content[8 : 8 + length]).get(name)
        if entry:
            begin, end = entry["data_offsets"]
            return path, 8 + length + begin, 8 + length + end
    raise AssertionError(name)


def edit(made: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path, begin, end = file_of(made, name)
    content = path.read_bytes()
    changed = change(content[begin:end])
    assert len(changed) == end - begin
    assert changed != content[begin:end]
    path.write_bytes(content[:begin] + changed + content[end:])


def rewrite(made: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the folder's tensors again, changed, with an index that fits, and a manifest that tells of no files."""
    tensors = read_folder(made)
    change(tensors)
    for path in made.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((made / "config.json").read_text())
    write_folder(made, tensors, config, 2)
    manifest = json.loads((made / "moeconv.json").read_text())
    (made / "moeconv.json").write_text(json.dumps({**manifest, "files": []}))


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "1kB"], ["--jobs", "1"]])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_fresh_folder_is_right(source: Path, command: str, options: list[str]) -> None:
    made = source.parent / "made"
    succeeds(command, source, made, *options)
    result = succeeds("verify", made, "--against", source)
    tensors = 10 if command == "pack" else 30
    assert f"{made}: {tensors} tensors, structure right, 3.52 kB equal byte for byte to {source}" in result.out
    report = json.loads(succeeds("verify", made, "--against", source, "--json").out)
    assert (report["ok"], report["tensors"], report["compared_bytes"], report["problems"]) == (True, tensors, 3520, [])
    assert json.loads(succeeds("verify", made, "--json").out)["compared_bytes"] == 0


@pytest.mark.parametrize("name", [GATE_UP, DOWN, "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"])
@pytest.mark.parametrize("place", [0, 57, -1], ids=["first byte", "a byte", "last byte"])
def test_one_wrong_bit_is_found(source: Path, packed: Path, name: str, place: int) -> None:
    at = place % (file_of(packed, name)[2] - file_of(packed, name)[1])
    edit(packed, name, lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    message = faults(packed, source)
    assert f"{name} " in message
    assert f"differs from the source from byte {at:,} on" in message
    assert message.count("differs") == 1


def test_a_wrong_bit_in_the_source_is_found_too(source: Path, packed: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit(source, name, lambda content: content[:5] + bytes([content[5] ^ 128]) + content[6:])
    at = 2 * 240 + 120 + 5
    assert f"{GATE_UP} BF16 [4, 12, 10] differs from the source from byte {at} on" in faults(packed, source)


def test_gate_and_up_exchanged_are_found(source: Path, packed: Path) -> None:
    edit(packed, GATE_UP, lambda c: b"".join(c[at + 120 : at + 240] + c[at : at + 120] for at in range(0, 960, 240)))
    assert f"{GATE_UP} BF16 [4, 12, 10] differs from the source from byte 0 on" in faults(packed, source)


def test_gate_and_up_exchanged_in_one_expert_are_found(source: Path, packed: Path) -> None:
    edit(packed, GATE_UP, lambda c: c[:720] + c[840:] + c[720:840])
    assert f"{GATE_UP} BF16 [4, 12, 10] differs from the source from byte 720 on" in faults(packed, source)


def test_two_exchanged_experts_are_found(source: Path, packed: Path) -> None:
    edit(packed, DOWN, lambda content: content[:120] + content[240:360] + content[120:240] + content[360:])
    assert f"{DOWN} BF16 [4, 10, 6] differs from the source from byte 120 on" in faults(packed, source)


def test_two_exchanged_experts_are_found_in_the_unpacked_layout(source: Path) -> None:
    made = source.parent / "made"
    succeeds("unpack", source, made)

    def exchange(tensors: dict[str, Tensor]) -> None:
        first, second = (f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (1, 3))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    rewrite(made, exchange)
    message = faults(made, source)
    for expert in (1, 3):
        assert f"model.layers.0.mlp.experts.{expert}.up_proj.weight BF16 [6, 10] differs" in message
    assert message.count("differs") == 2


def test_exchanged_layers_are_found(source: Path, packed: Path) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        other = DOWN.replace("layers.0", "layers.1")
        tensors[DOWN], tensors[other] = tensors[other], tensors[DOWN]

    rewrite(packed, exchange)
    assert f"{DOWN} BF16 [4, 10, 6] differs" in faults(packed, source)


def test_files_that_are_not_those_that_were_written_are_named_without_the_source(packed: Path) -> None:
    path, manifest = sorted(packed.glob("*.safetensors"))[0], packed / "moeconv.json"
    content = path.read_bytes()
    path.write_bytes(content[:100].replace(b"BF16", b"F16 ", 1) + content[100:])
    assert path.name in refused("verify", packed, within=packed)
    path.write_bytes(content)
    listed = json.loads(manifest.read_text())
    listed["files"] = [{**file, "bytes": file["bytes"] + 1} for file in listed["files"]]
    manifest.write_text(json.dumps(listed))
    assert f"{path} has {len(content):,} bytes; " in refused("verify", packed, within=packed)


def test_a_flipped_bit_is_found_without_the_source_where_hashes_were_noted(source: Path) -> None:
    made = source.parent / "hashed"
    succeeds("pack", source, made, "--hash")
    succeeds("verify", made)
    path = made / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert f"{path} is not the file that was written: its sha256" in refused("verify", made, within=made)


def test_a_tensor_that_is_only_sharded_in_another_way_is_right(source: Path, packed: Path) -> None:
    rewrite(packed, lambda tensors: None)
    succeeds("verify", packed, "--against", source)


def test_a_missing_tensor_is_named(source: Path, packed: Path) -> None:
    rewrite(packed, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    assert "model.layers.1.input_layernorm.weight is missing" in faults(packed, source)
    rewrite(packed, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    assert "model.layers.{0..1}.input_layernorm.weight is missing" in faults(packed, source)


def test_a_missing_tensor_of_all_experts_is_named(source: Path, packed: Path) -> None:
    rewrite(packed, lambda tensors: tensors.pop(GATE_UP))
    assert ".mlp.experts.gate_up_proj is missing" in faults(packed, source)


def test_a_missing_layer_of_experts_is_named(source: Path, packed: Path) -> None:
    rewrite(packed, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts" in name])
    message = faults(packed, source)
    assert "model.layers.1 has a router (mlp.gate.weight) and no experts" in message


@pytest.mark.parametrize("name", ["model.extra.weight", "model.layers.2.input_layernorm.weight"])
def test_an_extra_tensor_is_named(source: Path, packed: Path, name: str) -> None:
    rewrite(packed, lambda tensors: tensors.update({name: tensor((10,))}))
    assert f"{name} does not come from the source" in faults(packed, source)


@pytest.mark.parametrize(("dtype", "shape"), [("F16", (7, 10)), ("BF16", (10, 7)), ("BF16", (70,)), ("F32", (7, 5))])
def test_a_tensor_of_another_dtype_or_shape_is_named(
    source: Path, packed: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    name = "lm_head.weight"
    rewrite(packed, lambda tensors: tensors.update({name: Tensor(dtype, shape, tensors[name].content)}))
    assert f"{name} {dtype} {list(shape)} should be {name} BF16 [7, 10]" in faults(packed, source)


def test_a_wrong_total_size_is_found_without_the_source(source: Path, packed: Path) -> None:
    path = packed / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"total_size": 3520', '"total_size": 3521'))
    message = refused("verify", packed, within=source.parent)
    assert "the index says total_size 3,521; the tensors have 3,520 bytes" in message
    assert message in faults(packed, source)


def test_a_missing_config_json_is_found_without_the_source(source: Path, packed: Path) -> None:
    (packed / "config.json").unlink()
    message = refused("verify", packed, within=source.parent)
    assert f"{packed} has no config.json" in message
    assert f"{packed} has no config.json" in faults(packed, source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_file_that_differs_is_found(source: Path, packed: Path, name: str) -> None:
    (packed / name).write_text((packed / name).read_text() + " ")
    assert f"{packed / name} differs from {source / name}" in faults(packed, source)


def test_another_file_that_is_missing_is_found(source: Path, packed: Path) -> None:
    (packed / "tokenizer.json").unlink()
    assert f"{packed / 'tokenizer.json'} is missing" in faults(packed, source)


def test_a_missing_expert_is_found_without_the_source(source: Path) -> None:
    made = source.parent / "made"
    succeeds("unpack", source, made)
    rewrite(made, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    message = refused("verify", made, within=source.parent)
    assert "mlp.experts.{expert}.up_proj.weight has 3 of 4 experts; missing: 2" in message


def test_damage_to_a_file_is_found_without_the_source(source: Path, packed: Path) -> None:
    path = file_of(packed, DOWN)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: the tensors take" in refused("verify", packed, within=source.parent)


def test_a_folder_that_another_tool_made_can_be_verified(source: Path, packed: Path) -> None:
    (packed / "moeconv.json").unlink()
    succeeds("verify", packed)
    succeeds("verify", packed, "--against", source)
    edit(packed, DOWN, lambda content: bytes(len(content)))
    assert f"{DOWN} BF16 [4, 10, 6] differs" in faults(packed, source)


def test_the_wrong_source_is_told_from_the_right_one(source: Path, packed: Path) -> None:
    other = write_folder(source.parent / "other", experts_layout(layers=3), CONFIG, 1)
    shutil.copy(source / "tokenizer.json", other)
    assert "model.layers.2.input_layernorm.weight is missing" in faults(packed, other)


def test_included_files_are_verified_too(source: Path) -> None:
    made = source.parent / "made"
    extra = {f"mtp.{name}": item for name, item in experts_layout(layers=1).items()}
    write_file(source / "mtp.safetensors", extra)
    succeeds("pack", source, made, "--include", "mtp.safetensors")
    succeeds("verify", made, "--against", source)
    name = f"mtp.{DOWN}"
    edit(made, name, lambda content: content[1:] + content[:1])
    assert f"{name} BF16 [4, 10, 6] differs" in faults(made, source)


def test_a_source_that_cannot_be_read_is_no_reason_to_call_a_folder_right(source: Path, packed: Path) -> None:
    (source / "model-00001-of-00003.safetensors").unlink()
    message = refused("verify", packed, "--against", source, within=source.parent)
    assert "model-00001-of-00003.safetensors is missing" in message


@pytest.mark.parametrize("option", [["--layout", "square"], ["--recipe", "no_such"], ["--jobs", "0"]])
def test_an_option_that_cannot_be_right_is_refused(source: Path, packed: Path, option: list[str]) -> None:
    for arguments in ([packed], [packed, "--against", source]):
        result = run("verify", *arguments, *option)
        assert result.code == (1 if "--recipe" in option else 2), result
        assert option["--jobs" not in option] in result.err


def test_a_folder_is_checked_with_the_recipe_and_files_it_was_made_with(tmp_path: Path) -> None:
    """A model_type that no recipe knows, and weights beside the index, through two conversions."""
    source = write_folder(tmp_path / "source", experts_layout(), {**CONFIG, "model_type": "unheard_of"}, 3)
    write_file(source / "mtp.safetensors", {"mtp.norm.weight": tensor((10,))})
    options = ("--recipe", "gate_up_down", "--include", "mtp.safetensors")
    succeeds("pack", source, tmp_path / "packed", *options)
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    succeeds("verify", tmp_path / "packed", "--against", source)
    succeeds("verify", tmp_path / "back", "--against", source)
