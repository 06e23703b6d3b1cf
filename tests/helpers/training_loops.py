"""A training loop around a step that is simple enough to foresee."""

import jax.numpy as jnp
import optax

from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.run.loop import Loop, LoopSettings
from gemma_tune.training.run.metrics import MetricsWriter
from gemma_tune.training.state import StepMetrics, TrainState


class Recorder:
    def __init__(self):
        self.steps, self.evaluations, self.problems = [], [], []

    def on_step(self, step, num_steps, values):
        self.steps.append(step)

    def on_evaluation(self, step, values):
        self.evaluations.append((step, values["loss"]))

    def on_problem(self, message):
        self.problems.append(message)


def fresh_state():
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(3)}, (optax.EmptyState(), jnp.zeros(())))


def make_loop(path, num_steps=10, heldout=None, on_step=lambda step: 0.5, settings=(2, 3, 0, 1), keep_last=2):
    """A step that adds 1 to w; `on_step(step)` gives its loss. `heldout(w)` gives the held-out loss."""

    def train_step(state, frozen, batch):
        step = int(state.step)
        loss = on_step(step)
        values = StepMetrics(*(jnp.asarray(value, jnp.float32) for value in (loss, 4, 6, 1)))
        return TrainState(state.step + 1, {"w": state.trainable["w"] + 1}, state.opt_state), values

    checkpoints = Checkpoints(path / "checkpoints", keep_last)
    loop = Loop(
        train_step=train_step,
        frozen={},
        batches=range(num_steps),
        evaluate=None
        if heldout is None
        else lambda trainable, before_each: {"loss": heldout(float(trainable["w"][0])), "perplexity": 1.0},
        schedule=optax.constant_schedule(0.1),
        settings=LoopSettings(*settings),
        checkpoints=checkpoints,
        metrics=MetricsWriter(path, 0),
        reporter=Recorder(),
    )
    return loop, checkpoints
