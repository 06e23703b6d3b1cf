"""A base class of sequences whose items are created on access."""

import abc
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence whose items are created on access. A slice is a list."""

    @abc.abstractmethod
    def item(self, index: int) -> Item:
        """Returns an item. The index is neither negative nor too large."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place):
        indices = range(len(self))[place]
        return [self.item(index) for index in indices] if isinstance(place, slice) else self.item(indices)
