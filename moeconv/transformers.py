"""Lets `transformers` load folders whose experts are stored in bitsandbytes' 4-bit form.

    import moeconv.transformers
    model = AutoModelForCausalLM.from_pretrained("folder that `moeconv quantize --format nf4` wrote")

`load_in_4bit` of transformers leaves fused experts (3-D parameters such as `experts.gate_up_proj`) as they are, and
finds no place for files that hold them in 4 bits. Importing this module registers a quantizer for the `quant_method`
of such folders, through the public hooks of transformers. Without the import transformers refuses to load them, since
tensors of codes do not have the shapes of parameters.

Which parameters are packed, and how, is read from the files: each brings its state, such as
`NAME.quant_state.bitsandbytes__nf4` and what lies beside it. A packed `X.weight` of a plain `nn.Linear` makes X a
`bitsandbytes.nn.Linear4bit`, which peft knows. Every other packed parameter stays where it is and is unpacked when it
is read: all experts of one layer for the time of its forward pass, never more (`bitsandbytes.nn.parametrize`). The
model is built on the meta device, so that loading takes no more memory than the files have bytes.

Not supported: parameters on disk, tensor parallelism, and adapters on experts (`target_parameters` of peft).
Checked with transformers 5.10 and 5.23, bitsandbytes 0.50 and peft 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any, NamedTuple

from moeconv.errors import CheckpointError, Problem, UsageError
from moeconv.formats import METHOD
from moeconv.names import collapse
from moeconv.states import STATE_SUFFIXES, read_state, stated_names
from moeconv.tensors import Shape, Spec

_NEEDS = "moeconv.transformers needs transformers>=5.10 and bitsandbytes>=0.50"
_INSTALL = "pip install 'moeconv[transformers]'"
try:
    import bitsandbytes
    import torch
    import transformers
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
    from safetensors import safe_open
    from torch import Tensor, nn
    from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        rename_source_key,
    )
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"{_NEEDS}: {error}.\n  -> {_INSTALL}") from error
# Before 5.10 quantizers of transformers have no say in how tensors of a checkpoint are converted; before 0.50 unpacked
# experts of bitsandbytes pile up where activations are checkpointed.
for _library, _floor in ((transformers, (5, 10)), (bitsandbytes, (0, 50))):
    if tuple(map(int, _library.__version__.split(".")[:2])) < _floor:
        raise ImportError(f"{_NEEDS}; this is {_library.__name__} {_library.__version__}.\n  -> {_INSTALL}")

_PARTS = (".absmax", ".quant_map")
_NESTED_PARTS = (".nested_absmax", ".nested_quant_map")
_AGAIN = "Download or quantize the folder again: its files do not belong together, or are damaged."
_IGNORE = "Quantize again with --ignore for that module."


class Packed(NamedTuple):
    r"""One packed parameter of a model.

    Attributes:
        name: in the model.
        converted: its name in the checkpoint, after the renamings of transformers.
        target: what to make of that name: `\1`, which is what it is, or another one where renaming leads nowhere.
        shape: what it unpacks to.
        nbytes: of its codes and scales.
    """

    name: str
    converted: str
    target: str
    shape: torch.Size
    nbytes: int

    @property
    def place(self) -> Tensor:
        """Room for its codes [numel / 2, 1] on the meta device."""
        return torch.empty((self.shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. What it says of the form is for readers: tensors bring their own state.

    Args:
        bnb_4bit_compute_dtype: in which packed linear layers compute: `float32`, `bfloat16` or `float16`; None for
            the dtype of their input.
        described: whatever else it says, kept for `save_pretrained`.

    Raises:
        CheckpointError: not a dtype in which layers can compute.
    """

    def __init__(self, bnb_4bit_compute_dtype: str | None = None, **described: Any) -> None:
        self.__dict__.update(described)
        self.quant_method: str = METHOD  # type: ignore[assignment]
        self.bnb_4bit_compute_dtype = bnb_4bit_compute_dtype
        if bnb_4bit_compute_dtype not in (None, "float32", "bfloat16", "float16"):
            raise CheckpointError(
                f"config.json: bnb_4bit_compute_dtype is {bnb_4bit_compute_dtype!r}",
                "Write float32, bfloat16 or float16, or remove it.",
            )

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """`bnb_4bit_compute_dtype` as torch has it."""
        return getattr(torch, self.bnb_4bit_compute_dtype) if self.bnb_4bit_compute_dtype else None


class Unpacking(Bnb4bitParametrization):
    """Turns the codes of a parameter into its values whenever it is read.

    The state keeps what the file says. It is no part of the module, so `to` and the like do not reach it: it follows
    the codes to their device, and values get the dtype of what they are multiplied with (`_prepare`).

    Args:
        state: of the codes.
        dtype: of the values.
    """

    def __init__(self, state: QuantState, dtype: torch.dtype) -> None:
        super().__init__(state)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The values, in the parameter's shape, from its codes [numel / 2, 1]."""
        state = self.quant_state
        if state.absmax.device != quantized_param.device:
            state.to(quantized_param.device)
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype  # bitsandbytes has no wider one
        if state.dtype != dtype:
            state = copy(state)
            state.dtype = dtype
        return dequantize_4bit(quantized_param, state).to(self.dtype)


class AttachPacked(ConversionOps):
    """Puts one packed tensor, with its state, where the model has the parameter."""

    def __init__(self, hf_quantizer: PackedQuantizer) -> None:
        # Without an attribute of this name the loader casts all that it reads to the parameter's dtype: absmax to
        # uint8, and the model loads without a word and computes nonsense.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachPacked:
        return self  # the loader copies converters, with their operations, for every tensor

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Attach one parameter, or return it where the loader has to.

        Args:
            input_dict: lists of one tensor, by the patterns that matched it.
            source_patterns: all patterns.
            target_patterns: of what is made.
            kwargs: the name in the model, the model, and names that have not been found yet.
        """
        name, model = kwargs["full_layer_name"], kwargs["model"]
        tensors = {self.hf_quantizer.suffixes[pattern]: found[0] for pattern, found in input_dict.items()}
        codes = tensors.pop("")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Linear4bit):
            return {name: [Params4bit.from_prequantized(codes, tensors, device=codes.device, module=module)]}
        if not is_parametrized(module):
            module.register_forward_pre_hook(_prepare, with_kwargs=True)
        setattr(module, leaf, nn.Parameter(codes, requires_grad=False))
        replace_parameter_4bit_prequantized(module, leaf, tensors, codes.device)
        module._is_hf_initialized = True  # else its values would be made, to be initialized, and thrown away
        chain = module.parametrizations[leaf]
        chain[0] = Unpacking(chain[0].quant_state, model.config.dtype)
        kwargs["missing_keys"].discard(name)
        return {}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads what is packed already; it quantizes nothing.

    Attributes:
        packed: by their names in the model.
        converters: of them.
        suffixes: what the loader's patterns stand for: codes (nothing), or a part of their state.
    """

    requires_calibration = True  # by which transformers refuses to quantize with it
    is_trainable = True  # adapters on it are
    quantization_config: PackedConfig
    packed: dict[str, Packed]
    converters: list[WeightConverter]
    suffixes: dict[str, str]

    def is_serializable(self) -> bool:
        """State dicts hold the packed form."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Asked for a `device_map` as it was given, and as it was found where that is "auto".

        Raises:
            UsageError: it leaves something on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "device_map leaves parts of the model on disk, where packed parameters have no form",
                "Give a device_map without disk, or more room with max_memory.",
            )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes for each element that `param` has now, for device maps. Scales count as well."""
        packed = self.packed.get(param_name)
        return packed.nbytes / param.numel() if packed else super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **about: Any) -> None:
        """Give packed parameters their packed form in a model that is still on the meta device."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise UsageError("packed parameters cannot be split over devices", "Load without distributed_config.")
        self.packed = {packed.name: packed for packed in _packed(model, about["checkpoint_files"] or ())}
        self.converters = list(self._converters(self.packed.values()))
        for packed in self.packed.values():
            owner, _, leaf = packed.name.rpartition(".")
            module = model.get_submodule(owner)
            if type(module) is nn.Linear and leaf == "weight":
                made = _packed_linear(module, packed.place, self.quantization_config.compute_dtype)
                model.set_submodule(owner, made)
            else:
                setattr(module, leaf, nn.Parameter(packed.place, requires_grad=False))

    def _converters(self, packed: Iterable[Packed]) -> Iterator[WeightConverter]:
        """What puts packed tensors where they belong, and notes in `suffixes` what its patterns stand for."""
        self.suffixes = {}
        names: dict[str, list[str]] = {}
        for each in packed:
            names.setdefault(each.target, []).append(re.escape(each.converted))
        # Patterns are regular expressions, and `\1` is what a group matched. With whole names, since layers whose
        # experts are not packed have names that differ in nothing but a number.
        for target, found in names.items():
            parts = ("", *_PARTS, *_NESTED_PARTS, *STATE_SUFFIXES)
            own = {rf"^({'|'.join(found)}){re.escape(part)}$": part.removeprefix(".") for part in parts}
            self.suffixes |= own
            yield WeightConverter(list(own), [target], [AttachPacked(self)])

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """The conversions of a model, after those of packed tensors: the first whose patterns match is taken."""
        return [*self.converters, *weight_conversions]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Prepare for saving, which runs conversions backwards, and for peft."""
        held = vars(model)
        held["_weight_conversions"] = [each for each in held["_weight_conversions"] if not self._undoes_packed(each)]
        held["is_loaded_in_4bit"] = True  # peft looks for it before it wraps a Linear4bit
        return model

    def _undoes_packed(self, conversion: WeightTransform) -> bool:
        """It is ours, which has nothing to undo, or would take codes for the parameter that it makes on loading."""
        if not isinstance(conversion, WeightConverter):
            return False
        if any(isinstance(each, AttachPacked) for each in conversion.operations):
            return True
        back = conversion.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in self.packed)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Unpack all parameters for good, which `model.dequantize()` asks for.

        Raises:
            UsageError: the model is spread over devices.
        """
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UsageError("a model that is spread over devices cannot be dequantized", "Load it onto one device.")
        made = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name in self.packed:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Linear4bit):
                model.set_submodule(owner, _plain_linear(module, made))
            else:
                values = getattr(module, leaf).to(made)
                remove_parametrizations(module, leaf, leave_parametrized=False)
                setattr(module, leaf, nn.Parameter(values))
        del model.is_loaded_in_4bit, model._weight_conversions  # so that it is saved as one that was never packed
        return model


def _packed(model: PreTrainedModel, files: Sequence[str]) -> Iterator[Packed]:
    """Packed parameters that a model has, from the headers of its files and the states in them.

    Raises:
        CheckpointError: with all that is wrong. Found before anything is loaded, since the loader would take some of
            it for parameters that `ignore_mismatched_sizes` allows to make up.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    there = dict(model.named_parameters())
    problems: list[Problem] = []
    unfit: dict[str, list[str]] = {}
    for stored, state in _states(files, problems).items():
        converted, _ = rename_source_key(stored, renamings, [])
        # As the loader does, which takes a name as it is where renaming leads nowhere.
        names = [rename_source_key(each, [], [], model.base_model_prefix, there)[0] for each in (converted, stored)]
        name = next((name for name in names if name in there), None)
        if name is None and rename_source_key(converted, [], converters)[1] is None:
            continue  # transformers reports it as unexpected
        if (why := _unfit(model, name)) is not None:
            unfit.setdefault(why, []).append(stored)
        if name is None:
            continue
        if state.shape != there[name].shape:
            message = f"{stored} was packed as {list(state.shape)}, the model has {list(there[name].shape)}"
            problems.append(Problem(message, "Load it with the config.json that moeconv wrote beside it."))
        yield Packed(name, converted, r"\1" if name == names[0] else name, there[name].shape, state.nbytes)
    problems += [
        Problem(f"{line} is packed, but {why}", f"Quantize again with --ignore '{_pattern(line)}'.")
        for why, names in unfit.items()
        for line in collapse(names)
    ]
    if problems:
        raise CheckpointError.of(problems)


def _pattern(line: str) -> str:
    """For `--ignore`: a module, in whichever layer."""
    *_, last = re.split(r"^(?:.*\.)?(?:\d+|\{.*\})\.", line.removesuffix(".weight"))
    return last if last == line.removesuffix(".weight") else f"*.{last}"


class _Stated(NamedTuple):
    shape: Shape
    nbytes: int


def _states(files: Iterable[str], problems: list[Problem]) -> dict[str, _Stated]:
    """Shape and size of each packed tensor, by its name.

    Args:
        files: that hold the model.
        problems: receives tensors whose parts are not what their state says, or are not there.
    """
    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for file in files:
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{file} is no safetensors file", "Load the folder as moeconv wrote it.")
            opened = stack.enter_context(safe_open(file, framework="pt"))
            holders |= dict.fromkeys(opened.keys(), opened)
        slices = {name: opened.get_slice(name) for name, opened in holders.items()}
        specs = {name: Spec(name, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}

        def read(name: str) -> bytes:
            return bytes(holders[name].get_tensor(name).view(torch.uint8).tolist())

        found = {base: read_state(base, specs, read) for base in stated_names(specs)}
    problems += [Problem(f"{base}: {state}", _AGAIN) for base, state in found.items() if isinstance(state, str)]
    for key in specs:
        name, _, part = key.rpartition(".")
        if f".{part}" in _PARTS and name not in found:
            problems.append(Problem(f"{key}: there is no quant_state for {name}", _AGAIN))
    return {
        base: _Stated(state.shape, sum(specs[state.names[part]].nbytes for part in ("weight", "weight.absmax")))
        for base, state in found.items()
        if not isinstance(state, str)
    }


def _unfit(model: PreTrainedModel, name: str | None) -> str | None:
    """Why a parameter of a model cannot be packed; None for one that the model makes from others."""
    if name is None:
        return "transformers makes the parameter from several tensors"
    precise = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    if not should_convert_module(name.removesuffix(".weight"), list(precise)):
        return f"{type(model).__name__} needs it in full precision"
    if name in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
        return f"{type(model).__name__} has it in two places"
    return None


def _packed_linear(linear: nn.Linear, place: Tensor, compute: torch.dtype | None) -> Linear4bit:
    """A layer on the meta device with room for codes."""
    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute)
    made.weight = Params4bit(place, module=made)
    # On CPUs with AVX512-BF16 the first forward pass would re-pack the weight, with scales rounded to BF16: it fails on
    # sizes that are no multiples of 32 and 64, and what is saved afterwards is not what was loaded.
    made.support_avx512bf16_for_cpu = False
    made.register_forward_pre_hook(_refuse_input)
    return made


def _plain_linear(packed: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    """The same layer, unpacked."""
    with torch.device("meta"):
        made = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    state: QuantState = copy(packed.weight.quant_state)  # type: ignore[attr-defined]
    state.dtype = dtype
    made.weight = nn.Parameter(dequantize_4bit(packed.weight.data, state))
    made.bias = packed.bias
    return made.train(packed.training)


def _prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: parameters will be unpacked in the dtype of its first input."""
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point())
    dtype = next((each.dtype for each in given), None)
    for chain in module.get_submodule("parametrizations").children() if is_parametrized(module) else ():
        unpacking, *others = chain.children()
        if not isinstance(unpacking, Unpacking):
            continue
        if others:
            # peft 0.21 leaves its parametrization behind after the pass: outputs drift from one to the next. What it
            # merges goes into a copy, and is lost.
            raise UsageError(
                f"packed parameters of {type(module).__name__} have a parametrization besides, such as an adapter",
                "Leave target_parameters of peft empty: adapters go on linear layers (target_modules).",
            )
        unpacking.dtype = dtype or unpacking.dtype


def _refuse_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    """What a `Linear4bit` would compute nonsense from, without a word."""
    if not args[0].is_floating_point():  # some models cast what they give a layer to the dtype of its weight
        raise CheckpointError("the model casts the input of a packed layer to the dtype of its weight", _IGNORE)
    if args[0].dtype == torch.float64:
        raise UsageError(
            "packed linear layers do not compute in float64", "Take float32, or unpack the model: model.dequantize()."
        )
