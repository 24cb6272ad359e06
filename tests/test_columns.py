"""AWQ, GPTQ and AutoRound: read as those libraries read them, and written as pack-quantized without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeconv.formats import ColumnInt, make_format
from tests.commands import refused, run, succeeds
from tests.meter import Meter
from tests.test_quantize import decoded, folder_tensors

GOLDEN = load_file(Path(__file__).parent / "golden" / "columns.safetensors")
KINDS = sorted({name.rpartition("/")[0] for name in GOLDEN})
NAMES = {torch.float16: "F16", torch.float32: "F32"}
GROUP = 32


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_read_as_its_library_reads_it(kind: str) -> None:
    parts = {name.rpartition("/")[2]: item for name, item in GOLDEN.items() if name.startswith(f"{kind}/")}
    expected = parts.pop("weight")
    library, how = kind.split("/")
    made = ColumnInt(
        "awq" if library == "autoawq" else "gptq", 8 if how.endswith("8") else 4, GROUP, how.startswith("sym"),
        int(library in ("autogptq", "autoround_gptq")), NAMES[parts["scales"].dtype], "g_idx" in parts,
        how.startswith("order"),
    )  # fmt: skip
    assert {part.suffix: part.shape for part in made.parts(tuple(expected.shape), "")} == {
        suffix: tuple(part.shape) for suffix, part in parts.items()
    }
    assert torch.equal(made.decode(parts, expected.shape[1], torch.float16), expected)


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [n, k] packed along the last axis into int32; column `order[i]` of each word's is its field i."""
    count = 32 // bits
    fields = codes.long().view(codes.shape[0], -1, count)[..., list(order or range(count))]
    packed = (fields << bits * torch.arange(count)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


class Kind:
    """How a checkpoint is packed: `awq`, `gptq`, `gptq_v2`, `round`, `round_gptq`, `round_awq`."""

    def __init__(self, name: str, bits: int = 4, is_symmetric: bool = False, has_order: bool = False) -> None:
        self.name, self.bits, self.is_symmetric, self.has_order = name, bits, is_symmetric, has_order

    def __str__(self) -> str:
        return f"{self.name}{self.bits}{'-sym' * self.is_symmetric}{'-order' * self.has_order}"

    @property
    def config(self) -> dict[str, Any]:
        same = {"bits": self.bits, "group_size": GROUP, "sym": self.is_symmetric, "desc_act": self.has_order}
        if self.name == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        if self.name.startswith("gptq"):
            return {"quant_method": "gptq", "checkpoint_format": self.name, **same}
        packing = {"round": "auto_round", "round_gptq": "auto_round:auto_gptq", "round_awq": "auto_round:auto_awq"}
        return {"quant_method": "auto-round", "packing_format": packing[self.name], **same}

    def parts(self, seed: int, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        """Parts of a random matrix, and the matrix in float32 by its definition."""
        generator = torch.Generator().manual_seed(seed)
        top = 1 << self.bits
        codes = torch.randint(0, top, (rows, columns), generator=generator)
        zeros = torch.randint(1, top, (rows, columns // GROUP), generator=generator)
        if self.is_symmetric:
            zeros = torch.full_like(zeros, top // 2)
        scales = (torch.rand((rows, columns // GROUP), generator=generator) + 0.5).mul(0.01).half()
        of_column = torch.arange(columns) // GROUP
        if self.has_order:
            of_column = of_column[torch.randperm(columns, generator=generator)]
        matrix = (codes - zeros[:, of_column]) * scales.float()[:, of_column]
        if self.name in ("awq", "round_awq"):
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            return {
                "qweight": words(codes.T.contiguous(), 4, order),
                "qzeros": words(zeros.T.contiguous(), 4, order),
                "scales": scales.T.contiguous(),
            }, matrix
        stored = zeros - 1 if self.name in ("gptq", "round_gptq") else zeros
        parts = {
            "qweight": words(codes, self.bits).T.contiguous(),
            "qzeros": words(stored.T.contiguous(), self.bits),
            "scales": scales.T.contiguous(),
        }
        return {**parts, "g_idx": of_column.int()} if self.name.startswith("gptq") else parts, matrix


EVERY = [
    Kind("awq"), Kind("round_awq"),
    *(Kind(name, bits, is_symmetric) for name in ("gptq", "gptq_v2", "round", "round_gptq") for bits in (4, 8)
      for is_symmetric in (False, True)),
    Kind("gptq", 4, has_order=True), Kind("gptq_v2", 8, has_order=True), Kind("gptq", 4, True, True),
]  # fmt: skip


def checkpoint(folder: Path, kind: Kind, config: dict[str, Any] | None = None) -> tuple[Path, dict[str, Tensor]]:
    """A tiny Mixtral whose experts are packed so, and its matrices."""
    hidden, inner = 128, 96
    settings = {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": inner, "num_local_experts": 2,
        "num_hidden_layers": 1, "torch_dtype": "float16",
        "quantization_config": kind.config if config is None else config,
    }  # fmt: skip
    block = "model.layers.0.block_sparse_moe"
    tensors = {
        "model.embed_tokens.weight": torch.ones(8, hidden).half(),
        f"{block}.gate.weight": torch.ones(2, hidden).half(),
    }
    matrices = dict(tensors)
    for expert in range(2):
        for number, (word, shape) in enumerate(
            {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items()
        ):
            parts, matrix = kind.parts(10 * expert + number, *shape)
            name = f"{block}.experts.{expert}.{word}"
            tensors.update({f"{name}.{part}": item for part, item in parts.items()})
            matrices[f"{name}.weight"] = matrix
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != {}}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, matrices


@pytest.mark.parametrize("kind", EVERY, ids=str)
@pytest.mark.parametrize("tile", [1 << 20, 1 << 10])
def test_a_checkpoint_is_dequantized(tmp_path: Path, kind: Kind, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    source, matrices = checkpoint(tmp_path / "source", kind)
    succeeds("dequantize", source, tmp_path / "made")
    made = folder_tensors(tmp_path / "made")
    assert made.keys() == matrices.keys()
    for name, matrix in matrices.items():
        assert torch.equal(made[name], matrix.half()), name
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize("kind", EVERY, ids=str)
def test_what_pack_quantized_can_hold_keeps_its_codes(tmp_path: Path, kind: Kind) -> None:
    """Decoded in float32 it is the same matrix; columns in order of activation are quantized again."""
    source, matrices = checkpoint(tmp_path / "source", kind)
    name = "w8a16" if kind.bits == 8 else "w4a16_asym"
    succeeds("quantize", source, tmp_path / "made", "--format", name, "--group-size", GROUP)
    plan = json.loads(succeeds("plan", "quantize", source, "--format", name, "--group-size", GROUP, "--json").out)
    why = plan["groups"][0]["why"]
    found = decoded(tmp_path / "made")
    is_kept = not kind.has_order and (kind.is_symmetric or name != "w8a16")
    assert ("with the same codes" in why) == is_kept
    for key, matrix in matrices.items():
        same = torch.equal(found[key].float(), matrix.float())
        assert same or ("experts" in key and not is_kept), key
    if kind.is_symmetric and is_kept and kind.bits == 4:
        succeeds("quantize", source, tmp_path / "again", "--format", "w4a16", "--group-size", GROUP)
        found = decoded(tmp_path / "again")
        assert all(torch.equal(found[key].float(), matrix.float()) for key, matrix in matrices.items())


@pytest.mark.parametrize("name", ["fp8_dynamic", "mxfp4a16", "nvfp4a16"])
def test_any_format_can_be_made_of_it(tmp_path: Path, name: str) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("awq"))
    succeeds("dequantize", source, tmp_path / "plain")
    succeeds("quantize", tmp_path / "plain", tmp_path / "wanted", "--format", name)
    succeeds("quantize", source, tmp_path / "made", "--format", name)
    wanted, made = folder_tensors(tmp_path / "wanted"), folder_tensors(tmp_path / "made")
    assert wanted.keys() == made.keys()
    assert all(torch.equal(made[key].view(torch.uint8), item.view(torch.uint8)) for key, item in wanted.items())


SETTINGS = [
    pytest.param({}, "config.json does not say what its qweight means", id="no settings"),
    pytest.param({**Kind("awq").config, "version": "gemv"}, "version gemv is not known", id="AWQ for other kernels"),
    pytest.param({"quant_method": "hqq"}, "'hqq', which cannot be decoded yet", id="another method"),
]


@pytest.mark.parametrize(("config", "says"), SETTINGS)
def test_settings_that_do_not_tell_are_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("awq"), config)
    assert says in refused("dequantize", source, tmp_path / "made", within=tmp_path)


def test_three_bits_are_refused(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("gptq"))
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if key.endswith((".qweight", ".qzeros"))]:
        words_ = tensors[key].shape
        tensors[key] = (
            tensors[key][: words_[0] * 3 // 4] if "qw" in key else tensors[key][:, : words_[1] * 3 // 4]
        ).clone()
    save_file(tensors, source / "model.safetensors")
    assert "gptq with 3 bits" in refused("dequantize", source, tmp_path / "made", within=tmp_path)


@pytest.mark.parametrize(
    ("kind", "claims", "says"),
    [
        (Kind("gptq"), {"sym": True}, "says that it is symmetric (sym), and its zero points say otherwise"),
        (Kind("gptq", has_order=True), {"desc_act": False}, "says that columns keep their order (desc_act), and g_idx"),
    ],
    ids=str,
)
def test_settings_that_lie_are_found_when_values_are_read(
    tmp_path: Path, kind: Kind, claims: dict[str, Any], says: str
) -> None:
    source, _ = checkpoint(tmp_path / "source", kind, {**kind.config, **claims})
    for command in (["dequantize"], ["quantize", "--format", "w4a16_asym", "--group-size", "32"]):
        result = run(command[0], source, tmp_path / "made", *command[1:], "--overwrite")
        assert result.code == 1
        assert says in result.err
        assert "model.layers.0.block_sparse_moe.experts." in result.err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("kind", "claims", "says"),
    [
        (Kind("gptq_v2"), {"checkpoint_format": "marlin"}, "gptq in the form 'marlin' is not known"),
        (Kind("gptq_v2"), {"checkpoint_format": "gptq_p"}, "gptq in the form 'gptq_p' is not known"),
        (Kind("round"), {"packing_format": "auto_round:fp8"}, "auto-round in the form 'auto_round:fp8' is not known"),
        (Kind("gptq"), {"desc_act": True}, "in order of activation (desc_act), and its g_idx is missing"),
    ],
    ids=str,
)
def test_forms_that_are_not_known_are_refused(tmp_path: Path, kind: Kind, claims: dict[str, Any], says: str) -> None:
    source, _ = checkpoint(tmp_path / "source", kind, {**kind.config, **claims})
    tensors = {name: item for name, item in load_file(source / "model.safetensors").items() if "g_idx" not in name}
    save_file(tensors, source / "model.safetensors")
    for command in (["dequantize"], ["quantize", "--format", "w4a16_asym", "--group-size", "32"]):
        assert says in refused(command[0], source, tmp_path / "made", *command[1:], within=tmp_path)


def test_one_order_that_is_lost_is_found(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("gptq", has_order=True))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.g_idx"]
    save_file(tensors, source / "model.safetensors")
    message = refused("dequantize", source, tmp_path / "made", within=tmp_path)
    assert "experts.1.w2: its columns are in order of activation (desc_act), and its g_idx is missing" in message
    assert "problems" not in message


@pytest.mark.parametrize("lost", ["qweight", "scales"])
def test_what_is_left_of_a_matrix_is_found(tmp_path: Path, lost: str) -> None:
    """Also where only the file beside config.json says that the model is quantized."""
    source, _ = checkpoint(tmp_path / "source", Kind("gptq"))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.0.block_sparse_moe.experts.1.w2.")]:
        tensors[name.replace("block_sparse_moe.experts.1.w2", "self_attn.o_proj")] = tensors[name].clone()
    del tensors[f"model.layers.0.self_attn.o_proj.{lost}"]
    save_file(tensors, source / "model.safetensors")
    assert "model.layers.0.self_attn.o_proj." in refused("dequantize", source, tmp_path / "made", within=tmp_path)


def test_zero_points_of_a_symmetric_matrix_are_one_number(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("gptq_v2", 4, True))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.qzeros"
    tensors[name][0, 0] = 0x77777777
    save_file(tensors, source / "model.safetensors")
    result = run("dequantize", source, tmp_path / "made")
    assert result.code == 1
    assert "its zero points say otherwise" in result.err


def test_a_symmetric_matrix_is_read_rightly_whatever_its_format_says(tmp_path: Path) -> None:
    """GPTQ tools have written either zero point under either name; with the wrong one 40 % of a matrix is error."""
    kind = Kind("gptq_v2", 4, True)
    source, matrices = checkpoint(tmp_path / "source", kind, {**kind.config, "checkpoint_format": "gptq"})
    succeeds("dequantize", source, tmp_path / "made")
    made = folder_tensors(tmp_path / "made")
    assert all(torch.equal(made[name], matrix.half()) for name, matrix in matrices.items())


@pytest.mark.parametrize("command", ["pack", "unpack", "convert"])
def test_its_experts_are_not_moved(tmp_path: Path, command: str) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("awq"))
    to = ["--to", "packed"] if command == "convert" else []
    message = refused(command, source, tmp_path / "made", *to, within=tmp_path)
    assert "qweight" in message or "experts" in message


@pytest.mark.parametrize("kind", [Kind("awq"), Kind("gptq"), Kind("gptq", 8), Kind("gptq", has_order=True)], ids=str)
def test_decoding_holds_no_more_than_it_says(kind: Kind) -> None:
    made = ColumnInt(
        kind.name, kind.bits, GROUP, kind.is_symmetric, 1, "F16", kind.name == "gptq", kind.has_order
    )  # fmt: skip
    parts, _ = kind.parts(1, 256, 2048)
    with Meter(*parts.values()) as used:
        made.decode(parts, 2048, torch.float16)
    assert used.peak <= made.live_nbytes * 256 * 2048
    with Meter(*parts.values()) as used:
        if not kind.has_order:
            make_format("w8a16" if kind.bits == 8 else "w4a16_asym", {"group_size": GROUP}).retold(made, parts)
    assert used.peak <= 16 * 256 * 2048


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("tile", [1 << 20, 1 << 14])
def test_fp8_of_modelopt_is_read(tmp_path: Path, by_block: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of rows without a second axis, and of blocks with two axes too many."""
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    source, _ = checkpoint(tmp_path / "source", Kind("awq"), {"quant_method": "modelopt", "quant_algo": "FP8"})
    generator = torch.Generator().manual_seed(4)
    tensors, expected = {}, {}
    for name, item in load_file(source / "model.safetensors").items():
        if not name.endswith(".qweight"):
            if ".experts." not in name:
                tensors[name] = expected[name] = item
            continue
        shape = (96, 128) if ".w2." not in name else (128, 96)
        module = name.removesuffix(".qweight")
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        blocks = (-(-shape[0] // 128), 1, -(-shape[1] // 128), 1)
        scales = torch.rand(blocks if by_block else shape[:1], generator=generator) + 0.5
        spread = (
            scales.expand(-1, 128, -1, 128).reshape(128, 128)[: shape[0], : shape[1]] if by_block else scales[:, None]
        )
        tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scales}
        expected[f"{module}.weight"] = (codes.float() * spread).half()
    save_file(tensors, source / "model.safetensors")
    succeeds("dequantize", source, tmp_path / "made")
    made = folder_tensors(tmp_path / "made")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], item) for name, item in expected.items())


@pytest.mark.parametrize(("suffix", "item"), [("weight", torch.ones(2, 2)), ("g_idx", torch.zeros(3).int())])
def test_a_tensor_that_does_not_belong_there_is_refused(tmp_path: Path, suffix: str, item: Tensor) -> None:
    """To decode the others and drop it would lose it without a word."""
    source, _ = checkpoint(tmp_path / "source", Kind("awq"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.0.block_sparse_moe.experts.1.w2.{suffix}"] = item
    save_file(tensors, source / "model.safetensors")
    message = refused("dequantize", source, tmp_path / "made", within=tmp_path)
    assert "experts.1.w2: its tensors are of no known form" in message


def test_a_search_that_chooses_nothing_is_said(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "source", Kind("awq"))
    options = ("--format", "w4a16_asym", "--group-size", GROUP)
    searched = succeeds("quantize", source, tmp_path / "made", *options, "--scale", "mse")
    assert "6 matrices keep their codes, so that --scale chooses nothing for them" in searched.err
    assert "--scale" not in succeeds("quantize", source, tmp_path / "other", *options).err
