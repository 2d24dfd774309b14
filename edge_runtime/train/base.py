"""The frozen base model: converted once, verified on use, and loaded at the planned precision.

`prepare` keeps converted bases in `<cache>/bases/<fingerprint>-<precision>/`; `load` reads one of them with little more
memory than its weights need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime import config
from edge_runtime.errors import BaseModelError, first_line, missing_extra, unknown_name
from edge_runtime.train import eight_bit, heap, prepared, regaining
from edge_runtime.train.convert import READERS, convert, precision_named
from edge_runtime.train.exclusive import exclusive, remove
from edge_runtime.train.lora_linear import frozen_product
from edge_runtime.train.quiet import quiet
from edge_runtime.train.source import Source, fingerprint, resolve
from profiles.light_import import light_import

try:
    import torch
    import transformers
    from safetensors import SafetensorError
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

Say = Callable[[str], None]

COMPUTE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class PreparedBase:
    """A base model ready to load.

    Attributes:
        folder: what transformers loads; never changed once it is there.
        fingerprint: of the base, the same at every precision.
        precision: a key of `convert.PRECISIONS`.
        label: a name for people.
        regained: directions of what each quantised layer lost that are beside it; see `regaining`.
    """

    folder: Path
    fingerprint: str
    precision: str
    label: str
    regained: int = 0


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A base model in memory.

    Attributes:
        model: transformers' causal language model, every parameter frozen.
        tokenizer: its tokenizer; call it with `add_special_tokens=False`.
        prepared: what was loaded.
    """

    model: Any
    tokenizer: Any
    prepared: PreparedBase


def _say_nothing(_: str) -> None:
    pass


def prepare(
    spec: str,
    *,
    precision: str = "nf4",
    regained: int = 0,
    cache: Path | None = None,
    memory_bytes: int | None = None,
    say: Say = _say_nothing,
) -> PreparedBase:
    """The base model that a person named, converted to a precision; converted at most once per machine.

    What is in the cache is verified, sizes and digests, and converted again if it is damaged. Several processes may
    prepare the same base at once: one converts, the others wait for it.

    Args:
        spec: an alias, folder, GGUF file or hub id (`source.resolve`), or a folder that was prepared before.
        precision: a key of `convert.PRECISIONS`.
        regained: directions of what each quantised layer lost, to be computed beside it; see `regaining`.
        cache: where converted bases are kept; `config.cache_dir()` when absent.
        memory_bytes: what this process may use, with what it uses already; a conversion that would need more is refused
            before it starts. None for no limit.
        say: is told, in a sentence, what takes time or went wrong.

    Raises:
        UnknownBaseError: nothing of that name.
        BaseModelError: an unknown precision, or one of which nothing is to be regained; a base that cannot be converted
            or trusted, or too little memory.
    """
    precision_named(precision)
    regaining.check_precision(precision, regained)
    source = resolve(spec)
    if prepared.is_prepared(source.path):
        return _given(source, precision, regained)
    bases = (cache or config.cache_dir()) / "bases"
    digest = fingerprint(source, memo=bases / "digests")
    folder = bases / (f"{digest[:16]}-{precision}" + (f"-regained-{regained}" if regained else ""))
    found = PreparedBase(folder, digest, precision, source.label, regained)
    if folder.is_dir() and not _fault(found):
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with exclusive(lock, f"another process is converting this base; waiting for {folder}", say):
        # Another process may have finished while this one waited.
        fault = _fault(found) if folder.is_dir() else ""
        if folder.is_dir() and not fault:
            return found
        if fault:
            say(f"the converted base in {folder} is damaged and is converted again: {fault}")
        say(f"converting {source.label} to {precision}, once; it is kept in {folder}")
        _convert_into(found, source, memory_bytes)
    heap.release()  # what conversion has freed: training in this process shall not be charged for it
    return found


def load(
    base: PreparedBase, *, compute_dtype: str, product_dtype: str | None = None, device: str = "cpu"
) -> LoadedBase:
    """A prepared base in memory, frozen, in training mode and without a key/value cache.

    Args:
        base: from `prepare`.
        compute_dtype: precision of activations and of all that is not a linear layer's weight; "bf16" or "fp32" for
            nf4, int8 and fp16, the precision of the weights for bf16 and fp32.
        product_dtype: precision in which the linear layers multiply while the model trains or is evaluated; that of
            the activations when absent. Where bfloat16 is slow, float32 products over bfloat16 activations are fast
            and lean.
        device: where to put it, in torch's words.

    Raises:
        BaseModelError: the folder cannot be loaded, or a plain base was asked to compute in another precision, or an
            unknown one.
        MissingExtraError: bitsandbytes or accelerate is not installed and the precision needs it.
    """
    products = product_dtype or compute_dtype
    _check_compute(base, compute_dtype, products)
    dtype = COMPUTE_DTYPES[compute_dtype]
    try:
        with quiet():
            if base.precision == "nf4":
                light_import("bitsandbytes")  # before transformers does, and in less memory
            model = _LOADERS.get(base.precision, _by_transformers)(base.folder, dtype, device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    except ImportError as error:
        raise missing_extra(error.name or "bitsandbytes", "client") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        raise BaseModelError(
            f"expected {base.folder} to load; found: {reason}; remove it, and it is made anew"
        ) from error
    model.requires_grad_(requires_grad=False)
    model.config.use_cache = False
    keep_gradients(model)
    _compute_in(model, dtype, COMPUTE_DTYPES[products])
    if base.regained:
        regaining.attach(model, base.folder)
    return LoadedBase(model.train(), tokenizer, base)


def _check_compute(base: PreparedBase, compute_dtype: str, products: str) -> None:
    allowed = precision_named(base.precision).compute
    if compute_dtype not in allowed:
        raise BaseModelError(
            f"expected a base of precision {base.precision} to compute in {' or '.join(allowed)}; found "
            f"'{compute_dtype}'; compute in that, or prepare the base at another precision"
        )
    if products not in COMPUTE_DTYPES:
        raise BaseModelError(unknown_name("product dtype", products, COMPUTE_DTYPES))


def warm() -> None:
    """Import what `load` asks transformers for, which has it imported then; for whoever forks before."""
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)


def _by_transformers(folder: Path, dtype: torch.dtype, device: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, local_files_only=True
    )


def _half(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Linear weights stay in float16, as they are stored, and are opened for each product."""
    model = _by_transformers(folder, torch.float16, device)
    for layer in _linear_layers(model):
        layer.product_dtype = dtype
        # Not for training alone: torch's own product takes no two types.
        layer.forward = partial(frozen_product, layer)
    return model


# Precisions that transformers cannot load by itself.
_LOADERS: dict[str, Callable[[Path, torch.dtype, str], Any]] = {"int8": eight_bit.load_model, "fp16": _half}


def keep_gradients(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in an evaluation, which silently costs later gradients.

    On CPUs with AVX512-BF16 `Linear4bit` repacks its weights for an inference kernel at the first forward pass in
    evaluation mode. The kernel has no backward pass, and the weights stay repacked: every training step after an
    evaluation then runs through it, and no gradient reaches the layers below, without any error. Evaluation would also
    differ from training by the kernel's rounding. Call it on every model with 4-bit layers before its first forward
    pass; elsewhere it does nothing.

    Source: `bitsandbytes.nn.Linear4bit.forward` and `bitsandbytes.matmul_4bit`, version 0.50.2.
    """
    for layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def _four_bit_layers(model: torch.nn.Module) -> Iterator[Any]:
    # By name, so that a plain model does not pay for importing bitsandbytes.
    return (module for module in model.modules() if type(module).__name__ == "Linear4bit")


def _linear_layers(model: Any) -> Iterator[Any]:
    """The linear layers of any kind but the head, whose products are not many."""
    head = model.get_output_embeddings()
    return (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)


def _compute_in(model: Any, dtype: torch.dtype, products: torch.dtype) -> None:
    """Make a model compute in a precision, and its linear layers multiply in one.

    A 4-bit layer's quantisation state remembers the precision that the weights once had; dequantising a layer into
    that first would double its transient memory where it was float32 and the product is bfloat16.
    """
    opened = {id(layer.weight): layer for layer in _linear_layers(model) if hasattr(layer, "product_dtype")}
    for parameter in model.parameters():
        # transformers 5 leaves the plain parameters of a quantised checkpoint as they are stored.
        if parameter.is_floating_point() and id(parameter) not in opened:
            parameter.data = parameter.data.to(dtype)
    for layer in _linear_layers(model) if products != dtype else opened.values():
        layer.product_dtype = products
    for layer in _four_bit_layers(model):
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        layer.weight.quant_state.dtype = products


def _given(source: Source, precision: str, regained: int) -> PreparedBase:
    """A folder that was prepared elsewhere: there is nothing to convert it from, so a fault is an error."""
    manifest = prepared.check(source.path)
    if manifest.precision != precision:
        raise BaseModelError(
            f"expected a base prepared as {precision}; found {source.path}, prepared as {manifest.precision}; give the "
            f"original base, or plan for {manifest.precision}"
        )
    if manifest.regained != regained:
        raise BaseModelError(
            f"expected a base prepared with {regained} directions regained; found {source.path}, prepared with "
            f"{manifest.regained}; prepare the original base with --regained {regained}, or give [adapter] regained = "
            f"{manifest.regained} to the whole fleet"
        )
    return PreparedBase(source.path, manifest.fingerprint, manifest.precision, manifest.label, regained)


def _fault(base: PreparedBase) -> str:
    """What is wrong with a cached base, or ''."""
    try:
        manifest = prepared.check(base.folder)
    except BaseModelError as error:
        return str(error)
    if (manifest.fingerprint, manifest.precision) != (base.fingerprint, base.precision):
        return f"expected {base.fingerprint[:16]}… as {base.precision}; found {manifest.fingerprint[:16]}…"
    if manifest.regained != base.regained:
        return f"expected {base.regained} directions regained; found {manifest.regained}"
    return ""


def _convert_into(base: PreparedBase, source: Source, memory_bytes: int | None) -> None:
    """Convert beside the final folder and put it in place in one step; the lock must be held."""
    partial = base.folder.with_name(f"{base.folder.name}.part")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        convert(source, partial, base.precision, memory_bytes=memory_bytes)
        if base.regained:
            _regain(replace(base, folder=partial, regained=0), source, base.regained, memory_bytes)
        prepared.seal(
            partial, fingerprint=base.fingerprint, precision=base.precision, label=base.label, regained=base.regained
        )
        remove(base.folder)
        partial.replace(base.folder)
    finally:
        remove(partial)


def _regain(base: PreparedBase, source: Source, regained: int, memory_bytes: int | None) -> None:
    """Add what is regained of a converted base to its folder."""
    checkpoint = READERS[source.kind](source.path)
    if memory_bytes is not None:
        regaining.check_memory(checkpoint, base.folder, memory_bytes)
    loaded = load(base, compute_dtype="bf16", product_dtype="fp32")
    regaining.write(loaded.model.eval(), loaded.tokenizer, checkpoint, base.folder, regained)
