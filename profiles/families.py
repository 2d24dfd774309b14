"""The families of adapters, a literal table: what each trains, how large that is, what it keeps, and where it can go.

A family adds to each target module a low-rank pair, tensors, or both. Of a tensor with a row for each direction of the
rank (hidden units, parts of a mask), a small device has the first rows; of one with a single row, all of it. What moves
over the wire, what is held and what is trained follow from these sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edge_runtime.errors import BaseModelError, ConfigError, unknown_name
from profiles.card import ModelCard

MARK = "#"
"""Between a module's path and a tensor's name; that of `edge_runtime.lora.dense`."""


class Piece(NamedTuple):
    """What a family adds to one module.

    Attributes:
        tensor: its name; empty for a low-rank pair.
        height: d_out of a pair; of a tensor, 1 for a single row, and 0 for as many rows as the rank.
        width: d_in of a pair, numbers of a row of a tensor.
        most: rows that a tensor may have; 0 for any number.
    """

    tensor: str
    height: int
    width: int
    most: int = 0

    def sizes(self, rank: int) -> tuple[int, ...]:
        """Numbers of each trained tensor at a rank."""
        if not self.tensor:
            return rank * self.width, rank * self.height
        return (self.width * self.rows(rank),)

    def rows(self, rank: int) -> int:
        """Directions or rows at a rank."""
        if not self.tensor:
            return rank
        return self.height or min(rank, self.most or rank)


@dataclass(frozen=True)
class Family:
    """One kind of trainable adapter.

    Attributes:
        trains: what is trained, for people.
        modules: whether its targets are linear layers, norms, or the embedding.
        ranked: whether its size depends on the rank.
        pieces: (module, d_out, d_in) → what it adds there; of a norm, both are its width.
        reads: whether the module's input is kept for the backward pass.
        kept: (module, d_out, d_in, rank) → numbers kept of each token besides.
        opened: further copies of the largest weight that exist for a moment, in the compute type.
        exchange: what the merge of it means.
        exports: names of the export formats that have it.
        examples: target modules that go with it, for messages.
        virtual: whether as many tokens as the rank held stand before each example.
    """

    trains: str
    modules: Literal["linear", "norm", "embedding"]
    ranked: bool
    pieces: Callable[[str, int, int], tuple[Piece, ...]]
    reads: bool
    kept: Callable[[str, int, int, int], int]
    opened: int
    exchange: str
    exports: tuple[str, ...]
    examples: tuple[str, ...]
    virtual: bool = False

    @property
    def paired(self) -> bool:
        """Whether low-rank pairs are among what it trains."""
        return any(not piece.tensor for piece in self.pieces("", 1, 1))


EMBEDDING = "embed_tokens"

# Modules of which (IA)³ scales what goes in and not what comes out; PEFT's `feedforward_modules`.
SCALED_INPUTS = frozenset({"down_proj", "fc2", "c_proj"})

_ROWS = "mean of the changes, entry by entry, over those who trained the row"


def _nothing(_module: str, _d_out: int, _d_in: int, _rank: int) -> int:
    return 0


def _scale(module: str, d_out: int, d_in: int) -> tuple[Piece, ...]:
    return (Piece("scale_in", 1, d_in) if module in SCALED_INPUTS else Piece("scale", 1, d_out),)


def _masked(_module: str, d_out: int, d_in: int) -> tuple[Piece, ...]:
    # A mask of more than half of the weight is none.
    return (Piece("values", 0, d_out + d_in, most=max(1, d_out * d_in // (2 * (d_out + d_in)))),)


FAMILIES: Mapping[str, Family] = {
    "lora": Family(
        "low-rank pairs beside linear layers", "linear", True,
        lambda _module, d_out, d_in: (Piece("", d_out, d_in),),
        True, _nothing, 0, "that of the method", ("peft",), ("q_proj", "v_proj"),
    ),
    "dora": Family(
        "low-rank pairs, and the magnitude of each row of the weight", "linear", True,
        lambda _module, d_out, d_in: (Piece("", d_out, d_in), Piece("magnitude", 1, d_out)),
        True, lambda _module, d_out, _d_in, _rank: d_out, 2,
        f"pairs by the method; of magnitudes, the {_ROWS}; not the mean of the weights that they make together",
        ("peft",), ("q_proj", "v_proj"),
    ),
    "ia3": Family(
        "a scale of each output of a linear layer, or of each input of down_proj", "linear", False, _scale,
        False, lambda module, d_out, d_in, _rank: d_in if module in SCALED_INPUTS else d_out, 0,
        _ROWS, ("peft",), ("k_proj", "v_proj", "down_proj"),
    ),
    "bitfit": Family(
        "a bias of each output of a linear layer", "linear", False,
        lambda _module, d_out, _d_in: (Piece("bias", 1, d_out),),
        False, _nothing, 0, _ROWS, (), ("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "layer_norm": Family(
        "the weights of norms", "norm", False,
        lambda _module, d_out, _d_in: (Piece("weight", 1, d_out),),
        False, lambda _module, d_out, _d_in, _rank: d_out, 0,
        _ROWS, (), ("input_layernorm", "post_attention_layernorm"),
    ),
    "sparse": Family(
        "the entries of a weight at a fixed mask, as many as a pair of that rank has numbers", "linear", True, _masked,
        True, _nothing, 3, _ROWS, (), ("q_proj", "v_proj"),
    ),
    "bottleneck": Family(
        "hidden units behind a linear layer: down, gelu, up", "linear", True,
        lambda _module, d_out, _d_in: (Piece("hidden", 0, 2 * d_out + 1),),
        False, lambda _module, d_out, _d_in, rank: d_out + 2 * rank, 0, _ROWS, (), ("o_proj", "down_proj"),
    ),
    "prompt": Family(
        "embeddings of virtual tokens before each example", "embedding", True,
        lambda _module, d_out, _d_in: (Piece("prompt", 0, d_out),),
        False, _nothing, 0, _ROWS, ("peft",), ("embed_tokens",), virtual=True,
    ),
    "prefix": Family(
        "keys and values of virtual tokens before each example, in every layer", "linear", True,
        lambda _module, d_out, _d_in: (Piece("prefix", 0, d_out),),
        False, _nothing, 0, _ROWS, (), ("k_proj", "v_proj"), virtual=True,
    ),
}  # fmt: skip


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ConfigError: no family of that name; lists those there are.
    """
    if name not in FAMILIES:
        raise ConfigError(unknown_name("family", name, FAMILIES))
    return FAMILIES[name]


def shape(card: ModelCard, name: str, module: str) -> tuple[int, int]:
    """(d_out, d_in) of a target module; of a norm or the embedding, its width twice.

    Raises:
        BaseModelError: the model has no such module, or not of the kind that the family goes with.
    """
    kind = family(name).modules
    if kind == "linear":
        return card.shape(module)
    if kind == "embedding":
        if module != EMBEDDING:
            raise BaseModelError(unknown_name(f"target module of family '{name}'", module, (EMBEDDING,)))
        return card.hidden_size, card.hidden_size
    norms = {key.removesuffix(".weight"): width for key, width in card.layer_vectors.items() if key.endswith(".weight")}
    if module not in norms:
        raise BaseModelError(unknown_name(f"target module of family '{name}'", module, norms))
    return norms[module], norms[module]


def pieces(card: ModelCard, name: str, module: str) -> tuple[Piece, ...]:
    """What a family adds to a target module; raises as `shape`."""
    return family(name).pieces(module, *shape(card, name, module))


def path(card: ModelCard, name: str, index: int, module: str) -> str:
    """The target module's path in the live model; there is one embedding for all layers."""
    kind = family(name).modules
    if kind == "embedding":
        return f"model.{module}"
    return card.layer_name(index, module) if kind == "linear" else f"model.layers.{index}.{module}"


def sizes(card: ModelCard, name: str, modules: Sequence[str], rank: int, layers: int) -> list[int]:
    """Numbers of each tensor that a family adds to these modules of so many decoder layers, at a rank."""
    of_one = [size for module in modules for piece in pieces(card, name, module) for size in piece.sizes(rank)]
    return of_one * (1 if family(name).modules == "embedding" else layers)


def numbers(card: ModelCard, name: str, modules: Sequence[str], rank: int, layers: int) -> int:
    """All of them together."""
    return sum(sizes(card, name, modules, rank, layers))


def kept(card: ModelCard, name: str, modules: Sequence[str], rank: int) -> int:
    """Numbers that one decoder layer keeps of each token for these modules, beside what a frozen one keeps."""
    return sum(family(name).kept(module, *shape(card, name, module), rank) for module in modules)
