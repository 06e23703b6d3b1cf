"""The batches of a run as a function of the step alone, so that resuming needs no position in the data."""

import bisect
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from gemma_tune.data import Batch, EpochPlan, Rows, TokenizedExample, TokenStore, make_batch, plan_rows
from gemma_tune.data.mixture import EpochSampler
from gemma_tune.models.sharding.placement import MeshSharding


class TrainingBatches:
    """The training batches of a run, by step.

    Args:
        examples: Training examples.
        batch_size: Number of rows B.
        row_length: Positions L of a row.
        packing: Whether a row holds several examples.
        seed: Random seed of the order.
        num_epochs: Number of passes over the data.
        num_train_steps: Number of steps, for which the data is repeated if it is too short; 0: num_epochs.
        num_parts: Number of parts of a batch's rows, each of which is computed on its own.
        sampler: Sampler that draws the examples of each epoch of a mixture; None: an epoch has each example once.

    Attributes:
        target_sizes: Numbers of target positions, ascending: a third of the parts has no more than the first, two
            thirds no more than the second, and no part of any batch more than the last.
        filled_share: Share of the positions of the first epoch that hold tokens.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        *,
        batch_size: int,
        row_length: int,
        packing: bool,
        seed: int,
        num_epochs: int,
        num_train_steps: int = 0,
        num_parts: int = 1,
        sampler: EpochSampler | None = None,
    ):
        self._examples = TokenStore.of(examples)
        self.batch_size, self.row_length = batch_size, row_length
        self._plan = EpochPlan(self._examples.counts.num_tokens - 1, row_length, packing, seed, sampler)
        self._epoch, self._rows = -1, Rows(np.empty(0, np.int64), np.zeros(1, np.int64))
        self._first_steps = [0]  # Of each epoch, and the step behind the last one.
        self.target_sizes = self._survey(batch_size // num_parts, num_epochs, num_train_steps)
        self.num_steps = num_train_steps or self._first_steps[-1]

    @property
    def most_targets(self) -> int:
        """Largest number of target positions in any part of any batch of the run."""
        return self.target_sizes[-1]

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of the first epoch. Only in a mixture can other epochs have others."""
        return self._first_steps[1]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> Batch:
        """Returns some rows of a batch."""
        rows = [[self._examples[i] for i in row] for row in self._batch_rows(step)[start:stop]]
        return make_batch(rows, stop - start, self.row_length)

    def example_indices(self, step: int) -> list[int]:
        """Returns the indices of a step's examples."""
        return [int(i) for row in self._batch_rows(step) for i in row]

    def _batch_rows(self, step: int) -> list[np.ndarray]:
        step = range(self.num_steps)[step]
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        rows = self._epoch_rows(epoch)
        first = (step - self._first_steps[epoch]) * self.batch_size
        return [rows[row] for row in range(first, min(first + self.batch_size, len(rows)))]

    def _epoch_rows(self, epoch: int) -> Rows:
        if epoch != self._epoch:  # Only one epoch is in memory.
            self._epoch, self._rows = epoch, self._plan.rows(epoch)
        return self._rows

    def _survey(self, num_rows: int, num_epochs: int, num_train_steps: int) -> tuple[int, ...]:
        """Goes through all epochs: finds their first steps, and returns the `target_sizes`."""
        most, usual = 0, np.empty(0)
        for epoch in itertools.count():
            first_step, rows = self._first_steps[-1], self._epoch_rows(epoch)
            num_steps = -(-len(rows) // self.batch_size)  # Each epoch begins a new batch.
            per_row = np.zeros(num_steps * self.batch_size, np.int64)
            per_row[: len(rows)] = rows.sums(self._examples.counts.num_targets)
            per_batch = per_row.reshape(-1, self.batch_size // num_rows, num_rows).sum(axis=2)
            most = max(most, int(per_batch[: num_train_steps - first_step if num_train_steps else None].max()))
            if epoch == 0:
                num_tokens = rows.sums(self._examples.counts.num_tokens).sum()
                self.filled_share = float(num_tokens) / (len(per_row) * self.row_length)
                usual = np.quantile(per_batch[: num_train_steps or None], (1 / 3, 2 / 3), method="higher")
            self._first_steps.append(first_step + num_steps)
            if self._first_steps[-1] >= num_train_steps if num_train_steps else epoch + 1 == num_epochs:
                break
        return tuple(sorted({most, *(int(size) for size in usual if size > 0)}))


class HeldoutBatches(Sequence[Batch]):
    """All held-out examples in batches of the training shape, each made when it is read.

    Args:
        examples: Held-out examples.
        batch_size: Number of rows B.
        row_length: Positions L of a row.
        packing: Whether a row holds several examples.
        groups: [n] number of the group that each example belongs to, of which no batch has two; None: all are one.

    Attributes:
        group_of: Number of the group of each batch.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        batch_size: int,
        row_length: int,
        packing: bool,
        groups: np.ndarray | None = None,
    ):
        self._examples = TokenStore.of(examples)
        self.batch_size, self._row_length = batch_size, row_length
        lengths = self._examples.counts.num_tokens - 1
        groups = np.zeros(len(lengths), np.int64) if groups is None else np.asarray(groups)
        self._batches: list[list[np.ndarray]] = []  # Rows of each batch.
        self.group_of: list[int] = []
        for group in np.unique(groups).tolist():
            members = np.flatnonzero(groups == group)
            rows = [members[row] for row in plan_rows(lengths[members], row_length, packing)]
            batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
            self._batches += batches
            self.group_of += [group] * len(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index):
        return self.part(index, 0, self.batch_size)

    def part(self, index: int, start: int, stop: int) -> Batch:
        """Returns some rows of a batch."""
        rows = self._batches[range(len(self))[index]][start:stop]
        return make_batch([[self._examples[i] for i in row] for row in rows], stop - start, self._row_length)


def most_targets(batches: Sequence[Batch], num_parts: int = 1) -> int:
    """Returns the largest number of target positions in any part of any batch's rows; at least 1."""
    per_part = ((batch.loss_weights > 0).reshape(num_parts, -1).sum(axis=1).max() for batch in batches)
    return int(max(per_part, default=1)) or 1


class OnMesh(Sequence[Batch]):
    """Batches on the devices of a mesh. A process makes the rows of its own devices only.

    Args:
        batches: `TrainingBatches` or `HeldoutBatches`.
        sharding: Mesh sharding of the model.
    """

    def __init__(self, batches: TrainingBatches | HeldoutBatches, sharding: MeshSharding):
        self._batches, self._sharding = batches, sharding

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._sharding.put_batch(self._batches.batch_size, functools.partial(self._batches.part, index))
