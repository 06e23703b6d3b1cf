"""The batches of a run as a function of the step alone, so that resuming needs no position in the data."""

import functools
from collections.abc import Sequence

import numpy as np

from gemma_tune.data import Batch, EpochPlan, Rows, TokenizedExample, TokenStore, make_batch, plan_rows
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

    Attributes:
        target_sizes: Numbers of target positions, ascending: a third of the parts has no more than the first, two
            thirds no more than the second, and no part of any batch more than the last.
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
    ):
        self._examples = TokenStore.of(examples)
        self.batch_size, self.row_length = batch_size, row_length
        self._plan = EpochPlan(self._examples.counts.num_tokens - 1, row_length, packing, seed)
        self._epoch, self._rows = -1, Rows(np.empty(0, np.int64), np.zeros(1, np.int64))
        self.steps_per_epoch = -(-self._plan.num_rows // batch_size)  # Each epoch begins a new batch.
        self.num_steps = num_train_steps or num_epochs * self.steps_per_epoch
        self.target_sizes = self._target_sizes(batch_size // num_parts)

    @property
    def most_targets(self) -> int:
        """Largest number of target positions in any part of any batch of the run."""
        return self.target_sizes[-1]

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
        epoch, step_in_epoch = divmod(range(self.num_steps)[step], self.steps_per_epoch)
        rows = self._epoch_rows(epoch)
        first = step_in_epoch * self.batch_size
        return [rows[row] for row in range(first, min(first + self.batch_size, len(rows)))]

    def _epoch_rows(self, epoch: int) -> Rows:
        if epoch != self._epoch:  # Only one epoch is in memory.
            self._epoch, self._rows = epoch, self._plan.rows(epoch)
        return self._rows

    def _target_sizes(self, num_rows: int) -> tuple[int, ...]:
        most, usual = 0, np.empty(0)
        for first_step in range(0, self.num_steps, self.steps_per_epoch):
            rows = self._epoch_rows(first_step // self.steps_per_epoch)
            per_row = np.zeros(self.steps_per_epoch * self.batch_size, np.int64)
            per_row[: len(rows)] = rows.sums(self._examples.counts.num_targets)
            per_batch = per_row.reshape(-1, self.batch_size // num_rows, num_rows).sum(axis=2)
            per_batch = per_batch[: self.num_steps - first_step]
            most = max(most, int(per_batch.max()))
            if not first_step:
                usual = np.quantile(per_batch, (1 / 3, 2 / 3), method="higher")
        return tuple(sorted({most, *(int(size) for size in usual if size > 0)}))


class HeldoutBatches(Sequence[Batch]):
    """All held-out examples in batches of the training shape, each made when it is read.

    Args:
        examples: Held-out examples.
        batch_size: Number of rows B.
        row_length: Positions L of a row.
        packing: Whether a row holds several examples.
    """

    def __init__(self, examples: Sequence[TokenizedExample], batch_size: int, row_length: int, packing: bool):
        self._examples = TokenStore.of(examples)
        self.batch_size, self._row_length = batch_size, row_length
        self._rows = plan_rows(self._examples.counts.num_tokens - 1, row_length, packing)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __getitem__(self, index):
        return self.part(index, 0, self.batch_size)

    def part(self, index: int, start: int, stop: int) -> Batch:
        """Returns some rows of a batch."""
        first = range(len(self))[index] * self.batch_size
        rows = [self._rows[row] for row in range(first + start, min(first + stop, len(self._rows)))]
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
