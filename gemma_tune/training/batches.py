"""The order in which a run sees its data, as a function of the step alone, so that resuming needs no position of its
own.
"""

from collections.abc import Sequence

from gemma_tune.data import Batch, TokenizedExample, make_batch, num_positions, plan_epoch, plan_rows


class TrainingBatches:
    """Batch number s of a run, for any s.

    Args:
        examples: The training examples.
        batch_size: Rows B.
        row_length: Positions L of a row.
        packing: Several examples in a row.
        seed: Of the order.
        num_epochs: Passes over the data.
        num_train_steps: Stop there, or repeat until there; 0: after num_epochs.
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
    ):
        self._examples = examples
        self.batch_size, self.row_length = batch_size, row_length
        lengths = [num_positions(example) for example in examples]
        self._rows: list[list[int]] = []  # Of all epochs; each epoch begins a new batch.
        epoch = 0
        while epoch < num_epochs if not num_train_steps else len(self._rows) < num_train_steps * batch_size:
            rows = plan_epoch(lengths, row_length, packing, seed, epoch)
            self._rows += rows + [[]] * (-len(rows) % batch_size)
            epoch += 1
            if epoch == 1:
                self.steps_per_epoch = len(self._rows) // batch_size
        self.num_steps = num_train_steps or len(self._rows) // batch_size
        num_targets = [int(example.is_target.sum()) for example in examples]
        per_batch = (
            sum(num_targets[i] for row in self._batch_rows(step) for i in row) for step in range(self.num_steps)
        )
        self.most_targets = max(per_batch)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        """Returns batch `step`, counted from 0."""
        rows = [[self._examples[i] for i in row] for row in self._batch_rows(step)]
        return make_batch(rows, self.batch_size, self.row_length)

    def example_indices(self, step: int) -> list[int]:
        """Returns which examples batch `step` holds."""
        return [i for row in self._batch_rows(step) for i in row]

    def _batch_rows(self, step: int) -> list[list[int]]:
        return self._rows[step * self.batch_size : (step + 1) * self.batch_size]


def heldout_batches(
    examples: Sequence[TokenizedExample], batch_size: int, row_length: int, packing: bool
) -> list[Batch]:
    """Returns all held-out examples in batches of the training shape."""
    rows = plan_rows([num_positions(example) for example in examples], row_length, packing)
    return [
        make_batch([[examples[i] for i in row] for row in rows[start : start + batch_size]], batch_size, row_length)
        for start in range(0, len(rows), batch_size)
    ]


def most_targets(batches: Sequence[Batch]) -> int:
    """Returns the largest number of positions to score in a batch; at least 1."""
    return max([int((batch.loss_weights > 0).sum()) for batch in batches], default=1) or 1
