"""What stores of examples have in common."""

import abc
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence whose items are made when they are looked at; a slice is a list."""

    @abc.abstractmethod
    def item(self, index: int) -> Item:
        """Returns item `index`, which is neither negative nor too large."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place):
        indices = range(len(self))[place]
        return [self.item(index) for index in indices] if isinstance(place, slice) else self.item(indices)
