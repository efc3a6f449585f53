"""Shapes as operators declare them, and the check that every call goes through.

`"BHNK BHMK BHMK -> BHNK"`: a letter a dimension, one word a tensor; equal letters are equal sizes. A word that begins
with `*` has any number of dimensions in that place, the same in all words that begin so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

BROADCAST = "BH"
"""Dimensions that torch broadcasts in a product of matrices: images and heads."""

WIDTHS = "KCDF"
"""Dimensions that cannot be empty: widths of heads and layers."""


class ShapeError(ValueError):
    """Tensors whose shapes do not fit an operator; the message names them."""


class Shapes:
    """The shapes of an operator's tensor arguments, which come first among its arguments."""

    def __init__(self, name: str, declared: str, names: Sequence[str]) -> None:
        self.name, self.declared, self.names = name, declared, names
        self.words = declared.partition("->")[0].split()

    def fit(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, with images and heads broadcast as torch would.

        Raises: ShapeError where torch would refuse.
        """
        found: dict[str, Any] = {}
        for word, x in zip(self.words, args):
            if x is None:
                continue
            shape: Sequence[int] = x.shape
            if word[0] == "*":
                cut = len(shape) - len(word) + 1
                if cut < 0 or found.setdefault("*", shape[:cut]) != shape[:cut]:
                    self._refuse(args)
                shape, word = shape[cut:], word[1:]
            elif len(shape) != len(word):
                return self._broadcast(args)
            for letter, size in zip(word, shape):
                if found.setdefault(letter, size) != size:
                    return self._broadcast(args)
        if not all(found.get(letter, 1) for letter in WIDTHS):
            self._refuse(args)
        return args

    def _broadcast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        sizes: dict[str, int] = {}
        if not any(x is not None and x.dim() == len(word) for word, x in zip(self.words, args) if word[0] == "B"):
            self._refuse(args)
        for word, x in zip(self.words, args):
            if x is None or word[0] == "*" or x.dim() > len(word):
                self._refuse(args)
            for letter, size in zip(reversed(word), reversed(x.shape)):
                known = sizes.setdefault(letter, size)
                if letter in BROADCAST and 1 in (known, size):
                    sizes[letter] = size if known == 1 else known
                elif known != size:
                    self._refuse(args)
            missing = word[: len(word) - x.dim()]
            if any(letter not in BROADCAST for letter in missing):
                self._refuse(args)
            for letter in missing:
                sizes.setdefault(letter, 1)
        if not all(sizes.get(letter, 1) for letter in WIDTHS):
            self._refuse(args)
        whole = (x.expand([sizes[letter] for letter in word]) for word, x in zip(self.words, args))
        return (*whole, *args[len(self.words) :])

    def _refuse(self, args: tuple[Any, ...]) -> None:
        tensors = [(n, tuple(x.shape)) for n, x in zip(self.names, args) if isinstance(x, Tensor)]
        listed = ", ".join(f"{name} {shape}" for name, shape in tensors)
        raise ShapeError(f"{self.name}: {listed} do not fit {self.declared}; equal letters must be equal sizes")
