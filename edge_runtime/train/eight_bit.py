"""8-bit linear layers: weights as int8 with one scale per output row, exact in whichever precision they compute in.

An int8 and its row's scale stand for the weight `q · scale`. The scales are rounded to bfloat16 before anything is
quantised by them, so they cost 2 bytes a row and are exact in bfloat16 and float32 alike; int8 values are exact in
both as well. A layer multiplies by the integers first and by the scales of the rows afterwards, so a dequantised weight
is never rounded, and no copy of it exists but the integers in the compute precision, one layer at a time.

bitsandbytes has 8-bit layers too (LLM.int8, arXiv 2208.07339). They are not used here: on a CPU their evaluation
quantises the activations while their training does not, which triples the error of the output and makes a model
evaluate differently from how it trains, and they keep the input of every frozen layer until its backward pass.

Source of the rounding: per-channel symmetric quantisation, Jacob et al., arXiv 1712.05877, section 2.1, with zero point
0 and integers from -127 to 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, missing_extra
from edge_runtime.train.source import weight_files

try:
    import torch
    import transformers
    from accelerate import init_empty_weights
    from safetensors import safe_open
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

METHOD = "edge-runtime-int8"
"""`quant_method` in config.json. transformers knows none such and says so; 4 fails then, 5 goes on with the integers as
weights: these folders are for `load_model` alone."""
LARGEST = 127
"""Largest integer; -128 is not used, so that the range is symmetric."""
_SCALE = "scale"


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a weight as integers and scales: every element is off by half its row's scale at most.

    Args:
        weight: (d_out, d_in), any floating precision, finite.

    Returns:
        int8 (d_out, d_in) and bfloat16 (d_out,).

    Raises:
        ValueError: a weight that is not finite.
    """
    largest = weight.abs().amax(dim=1).float()
    if not torch.isfinite(largest).all():
        raise ValueError("a weight that is not finite cannot be quantised")
    # Rounding to the nearest bfloat16 moves the largest element to 127.25 steps at most, so nothing is clipped by it.
    scale = (largest / LARGEST).to(torch.bfloat16)
    # A row of zeros, or of numbers too small for a scale, is zero under any scale.
    scale[scale == 0] = 1
    steps = (weight.float() / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return steps.to(torch.int8), scale


class _Int8Product(torch.autograd.Function):
    """x · qᵀ · scale, with nothing saved for the backward pass but the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        product = torch.nn.functional.linear(x, weight.to(x.dtype))
        return product.mul_(scale.to(product.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer with int8 weights; computes in the precision of its input.

    A subclass of torch's layer because PEFT adapts those, and asks with isinstance. Merging an adapter into it is
    impossible: there is no room between two integers.

    Attributes:
        weight: int8 (out_features, in_features), never with a gradient.
        scale: bfloat16 (out_features,), a buffer.
        bias: (out_features,) or None.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        device: where the layer lives.
        dtype: of the bias.
    """

    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # On the meta device, so that no full-precision weight is made for a moment.
        super().__init__(in_features, out_features, bias=False, device="meta")
        empty = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.register_buffer(_SCALE, torch.ones(out_features, dtype=torch.bfloat16, device=device))
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = torch.nn.Parameter(zeros, requires_grad=False)

    @staticmethod
    def of(linear: torch.nn.Linear) -> Int8Linear:
        """A plain layer, quantised; for layers that are in memory already."""
        bias = linear.bias is not None
        made = Int8Linear(
            linear.in_features, linear.out_features, bias, device=linear.weight.device, dtype=linear.weight.dtype
        )
        with torch.no_grad():
            made.weight.data, made.scale = quantise(linear.weight)
            if bias:
                made.bias.copy_(linear.bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features), in the precision of `x`."""
        product: torch.Tensor = _Int8Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        bias: torch.Tensor | None = self._parameters["bias"]
        return product if bias is None else product + bias.to(product.dtype)


def load_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """A causal language model from a folder with int8 weights, in evaluation mode.

    The model is made without weights, its quantised layers are exchanged, and tensors come in one at a time. On a CPU
    they stay mapped to their file where their precision is right: the system may drop such pages and read them again.

    Args:
        folder: with the configuration and the safetensors that `convert` wrote.
        dtype: of everything that is not int8.
        device: where to put it, in torch's words.

    Raises:
        BaseModelError: a tensor that the model lacks or that the files lack, or of another shape; or no weights.
        ValueError: transformers does not know the architecture.
        OSError: no configuration.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    # Buffers are made for real: rotary frequencies are in no file.
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    files = weight_files(folder)
    _exchange(model, files, folder)
    for name, tensor in _stored(files):
        _place(model, name, tensor, dtype=dtype, device=device, folder=folder)
    model.tie_weights()
    lacking = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if lacking:
        raise BaseModelError(
            f"expected all tensors of the model in {folder}; found none named {', '.join(lacking[:3])}"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval()


def _exchange(model: Any, files: Sequence[Path], folder: Path) -> None:
    """Put an empty 8-bit layer wherever the files have scales."""
    modules = dict(model.named_modules())
    for path in files:
        with safe_open(path, framework="pt") as file:
            scales = [name for name in file.keys() if name.endswith(f".{_SCALE}")]  # noqa: SIM118 - a handle, no dict
        for name in (scale.removesuffix(f".{_SCALE}") for scale in scales):
            linear = modules.get(name)
            if not isinstance(linear, torch.nn.Linear):
                raise BaseModelError(f"expected a linear layer '{name}', for the 8-bit weights in {folder}; found none")
            empty = Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, empty)


def _stored(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - as above
                yield name, file.get_tensor(name)


def _place(model: Any, name: str, tensor: torch.Tensor, *, dtype: torch.dtype, device: str, folder: Path) -> None:
    """Give a tensor its place in the model, in the precision and on the device that it is used in."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
        expected = getattr(module, leaf)
    except AttributeError as error:
        raise BaseModelError(
            f"expected tensors of a {type(model).__name__} in {folder}; found also '{name}'"
        ) from error
    if expected.shape != tensor.shape or expected.dtype.is_floating_point != tensor.dtype.is_floating_point:
        raise BaseModelError(
            f"expected '{name}' in {folder} as {tuple(expected.shape)}, {expected.dtype}; found "
            f"{tuple(tensor.shape)}, {tensor.dtype}"
        )
    # Scales keep the precision that they are exact in.
    kept = tensor.dtype if isinstance(module, Int8Linear) and leaf != "bias" else dtype
    moved = tensor.to(device=device, dtype=kept if tensor.is_floating_point() else tensor.dtype)
    is_parameter = isinstance(expected, torch.nn.Parameter)
    setattr(module, leaf, torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved)
