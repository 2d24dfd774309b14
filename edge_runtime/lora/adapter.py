"""Pair, Adapter and Slot: the values that everything else moves, merges and exports.

Conventions (everywhere outside `train/` and `export/`): `a` is (r, d_in), `b` is (d_out, r), both float32, and the
LoRA scale is folded into `b`, so that the change of a layer's weight is simply `b @ a`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pair:
    """One layer's low-rank change: `b @ a`.

    Attributes:
        a: (r, d_in), float32.
        b: (d_out, r), float32, scale folded in.
    """

    a: Matrix
    b: Matrix

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"a pair needs a: (r, d_in) and b: (d_out, r); found {self.a.shape} and {self.b.shape}")
        if self.a.dtype != np.float32 or self.b.dtype != np.float32:
            raise ValueError(f"a pair is float32; found {self.a.dtype} and {self.b.dtype}")

    @property
    def rank(self) -> int:
        """The number of directions, r."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the layer's weight."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def product(self) -> Matrix:
        """The dense (d_out, d_in) change; for tests and merging, never for aggregation."""
        return self.b @ self.a


@dataclass(frozen=True, eq=False)
class Deferred(Mapping[str, Pair]):
    """Layers that are made each time they are asked for, and not kept: so an adapter may be larger than memory.

    Attributes:
        sizes: layer name → (d_out, d_in, rank), in sorted order of the names.
        make: layer name → its pair, of that size.
    """

    sizes: Mapping[str, tuple[int, int, int]]
    make: Callable[[str], Pair]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", dict(sorted(self.sizes.items())))

    def __getitem__(self, name: str) -> Pair:
        if name not in self.sizes:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __contains__(self, name: object) -> bool:
        return name in self.sizes


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, Pair]):
    """Layer name → Pair, in sorted order of the names.

    A layer's name is its module path in the base model, such as `model.layers.3.self_attn.q_proj`. Of layers that are
    `Deferred`, sizes are known without making any.
    """

    layers: Mapping[str, Pair]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Deferred):
            object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    def __getitem__(self, name: str) -> Pair:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """(d_out, d_in, rank) of each layer."""
        if isinstance(self.layers, Deferred):
            return dict(self.layers.sizes)
        return {name: (*pair.shape, pair.rank) for name, pair in self.layers.items()}

    def rank_of(self, name: str) -> int:
        """Rank of one layer."""
        return self.layers.sizes[name][2] if isinstance(self.layers, Deferred) else self.layers[name].rank

    def shape_of(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of one layer."""
        return self.layers.sizes[name][:2] if isinstance(self.layers, Deferred) else self.layers[name].shape

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer."""
        return {name: rank for name, (_, _, rank) in self.sizes.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each layer."""
        return {name: (d_out, d_in) for name, (d_out, d_in, _) in self.sizes.items()}

    @property
    def parameters(self) -> int:
        """Numbers held, all layers together."""
        return sum(rank * (d_out + d_in) for d_out, d_in, rank in self.sizes.values())

    def only(self, names: Iterable[str]) -> Adapter:
        """The layers of those names that there are; none is made."""
        found = [name for name in names if name in self.layers]
        if isinstance(self.layers, Deferred):
            return Adapter(Deferred({name: self.layers.sizes[name] for name in found}, self.layers.make))
        return Adapter({name: self.layers[name] for name in found})

    def digest(self) -> str:
        """SHA-256 (hex) of names, shapes and bytes: equal digests mean equal adapters, bit for bit."""
        total = hashlib.sha256()
        for name, pair in self.layers.items():
            total.update(f"{name}:{pair.shape}:{pair.rank};".encode())
            total.update(np.ascontiguousarray(pair.a).tobytes())
            total.update(np.ascontiguousarray(pair.b).tobytes())
        return total.hexdigest()


def remembering(adapter: Adapter) -> Adapter:
    """The same adapter; of deferred layers the one made last stays, for whoever asks for it again and again."""
    if not isinstance(adapter.layers, Deferred):
        return adapter
    return Adapter(Deferred(adapter.layers.sizes, lru_cache(maxsize=1)(adapter.layers.make)))


def joined(parts: Iterable[Adapter]) -> Adapter:
    """The layers of several adapters as one; of a layer that several have, the last. None is made."""
    homes = {name: part for part in parts for name in part}
    if not any(isinstance(part.layers, Deferred) for part in homes.values()):
        return Adapter({name: part[name] for name, part in homes.items()})
    sizes = {name: (*part.shape_of(name), part.rank_of(name)) for name, part in homes.items()}
    return Adapter(Deferred(sizes, lambda name: homes[name][name]))


@dataclass(frozen=True)
class LayerSlot:
    """What one device does with one layer.

    Attributes:
        d_out: rows of the layer's weight.
        d_in: columns of the layer's weight.
        held: directions of the global adapter that the device holds in its forward pass.
        trained: directions among them that it trains and returns; 0 for a layer that it only holds.
    """

    d_out: int
    d_in: int
    held: int
    trained: int

    def __post_init__(self) -> None:
        if not 0 <= self.trained <= self.held:
            raise ValueError(f"a device trains at most what it holds; found trained={self.trained}, held={self.held}")


@dataclass(frozen=True)
class Slot:
    """What one device holds and trains, layer by layer; the part of its plan that the server must know."""

    layers: Mapping[str, LayerSlot]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    @property
    def held(self) -> dict[str, int]:
        """Directions held of each layer."""
        return {name: layer.held for name, layer in self.layers.items()}

    @property
    def trained(self) -> dict[str, int]:
        """Directions trained of each layer that is trained at all."""
        return {name: layer.trained for name, layer in self.layers.items() if layer.trained}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each layer."""
        return {name: (layer.d_out, layer.d_in) for name, layer in self.layers.items()}
