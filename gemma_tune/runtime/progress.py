"""Shows the progress of long work: a progress bar on a terminal, a line every few seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BEFORE_A_BAR = 1.0  # Shorter work needs none.
_HELDOUT = ("loss", "perplexity", "token_accuracy", "num_tokens")  # Others are metrics of answers.

# Everything except results goes to stderr, so that stdout can be piped.
console = Console(stderr=True, highlight=False, emoji=False)


class ProgressReporter:
    """A context manager that shows the progress of training: loss, tokens per second, time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._heldout = ""

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_step(self, step: int, num_steps: int, values: dict[str, float]) -> None:
        """Advances the bar, or prints a line."""
        skipped = values.get("num_skipped_steps", 0)
        text = f"loss {values.get('loss', float('nan')):.3f}  {values['tokens_per_second']:.0f} tokens/s{self._heldout}"
        text += f"  {skipped:.0f} skipped" if skipped else ""
        if not console.is_terminal:
            self._print_line(step, num_steps, text)
            return
        if self._bar is None:
            columns = (
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("<"),
                TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=num_steps, completed=step - 1, text="")
            self._bar.start()
        self._bar.update(self._task, completed=step, text=text)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Prints the metrics on held-out data."""
        when = "before training" if step == 0 else f"after step {step}"
        others = "".join(f", {name} {value:.3f}" for name, value in values.items() if name not in _HELDOUT)
        self._heldout = f"  held-out {values['loss']:.3f}{others}"
        console.print(
            f"held-out {when}: loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}, token accuracy "
            f"{values['token_accuracy']:.1%}{others}"
        )

    def on_problem(self, message: str) -> None:
        """Prints a problem that doesn't end the run."""
        console.print(message, style="yellow", markup=False)

    def _print_line(self, step: int, num_steps: int, text: str) -> None:
        now = time.monotonic()
        if step == num_steps or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            console.print(f"step {step}/{num_steps}  {text}")
            sys.stderr.flush()


@contextlib.contextmanager
def track_progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows the progress of work on many items.

    Args:
        what: Description of the items, such as `read rows`.
        total: Number of items, if it is known.

    Yields:
        Function to call with the number of items that were done since the last call.
    """
    bar = Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    task = bar.add_task(what, total=total)
    next_line = time.monotonic() + (_SECONDS_BEFORE_A_BAR if console.is_terminal else _SECONDS_BETWEEN_LINES)

    def advance(count: int) -> None:
        nonlocal next_line
        bar.update(task, advance=count)
        if time.monotonic() < next_line:
            return
        if console.is_terminal:
            bar.start()
        else:
            of_total = "" if total is None else f" of {total:,}"
            console.print(f"{what}: {bar.tasks[0].completed:,.0f}{of_total}")
        next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    try:
        yield advance
    finally:
        if bar.live.is_started:  # Otherwise stopping prints an empty line.
            bar.stop()
