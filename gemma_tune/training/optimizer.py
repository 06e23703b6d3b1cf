"""The learning rate schedule and the optimizer.

Their numbers are constants of the compiled step or inputs of it (`Hyperparameters`), with the same results bit for bit.
As inputs, runs that differ in nothing else share one compiled program. For that, whatever Python computes from
constants in double precision is an input of its own, such as `1 - b1`: float32's difference is another number.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_tune.config_checks import SCHEDULES
from gemma_tune.training.moments import scale_by_adam, scale_by_lion

_Number = Any  # A Python number, or a [] array.


class Schedule(NamedTuple):
    """A learning rate by step: a linear warm-up from zero, then constant, or falling to zero at the last step.

    Attributes:
        kind: Index in `config_checks.SCHEDULES`.
        peak: Peak learning rate.
        warmup_steps: Number of warm-up steps.
        warmup_slope: Learning rate of the first step minus the peak, if there is a warm-up.
        warmup_share: Share of the warm-up that a step is.
        decay_steps: Number of steps after the warm-up.
        decay_share: Share of these that a step is.
        decay_angle: The same as an angle, of a half turn in all.
    """

    kind: _Number
    peak: _Number
    warmup_steps: _Number
    warmup_slope: _Number
    warmup_share: _Number
    decay_steps: _Number
    decay_share: _Number
    decay_angle: _Number

    def __call__(self, count: _Number) -> jax.Array:
        """Returns the learning rate after so many updates."""
        count = jnp.asarray(count, jnp.float32)
        warm = self.warmup_slope * (1 - jnp.clip(count, 0, self.warmup_steps - 1) * self.warmup_share) + self.peak
        steps = jnp.clip(count - self.warmup_steps, 0, self.decay_steps)
        linear = self.peak * (1 - steps * self.decay_share)
        cosine = self.peak * (0.5 * (1 + jnp.cos(steps * self.decay_angle)))
        after = jnp.stack([jnp.broadcast_to(self.peak, linear.shape), linear, cosine])[self.kind]
        return jnp.where(count < self.warmup_steps, warm, after)


def make_schedule(name: str, learning_rate: float, warmup_steps: int, num_train_steps: int) -> Schedule:
    """Returns step -> learning rate.

    Args:
        name: `constant`, `linear` or `cosine`.
        learning_rate: Peak learning rate.
        warmup_steps: Number of warm-up steps; at most half of the run, so that short runs also reach the peak.
        num_train_steps: Number of steps of the run.
    """
    warmup_steps = min(warmup_steps, num_train_steps // 2)
    decay_steps = max(num_train_steps - warmup_steps, 1)
    share = np.float32(1) / np.float32(decay_steps)
    return Schedule(
        kind=SCHEDULES.index(name),
        peak=learning_rate,
        warmup_steps=warmup_steps,
        # The first step gets 1/warmup_steps of the peak, not zero.
        warmup_slope=learning_rate / max(warmup_steps, 1) - learning_rate,
        warmup_share=np.float32(1) / np.float32(max(warmup_steps - 1, 1)),
        decay_steps=decay_steps,
        decay_share=share,
        decay_angle=np.float32(np.pi) * share,
    )


class Hyperparameters(NamedTuple):
    """The numbers of the schedule, of the update rule, and of LoRA's dropout.

    Attributes:
        schedule: Learning rate by step.
        weight_decay: Factor of the weight decay.
        b1: Decay of the first moment; of `sgd`, momentum.
        b2: Decay of the second moment.
        one_minus_b1: 1 - b1.
        one_minus_b2: 1 - b2.
        epsilon: Term in AdamW's denominator.
        clip_norm: Largest global norm of the gradients; inf: no clipping.
        loraplus_lr_ratio: Factor of the learning rate for LoRA's second factors (LoRA+, arXiv:2402.12354).
        lora_dropout: Rate of the dropout on the input of LoRA's first factors, if the model has it.
        seed: Random seed of the dropout.
    """

    schedule: Schedule
    weight_decay: _Number
    b1: _Number
    b2: _Number
    one_minus_b1: _Number
    one_minus_b2: _Number
    epsilon: _Number
    clip_norm: _Number
    loraplus_lr_ratio: _Number
    lora_dropout: _Number = 0.0
    seed: _Number = 0

    def as_arrays(self) -> "Hyperparameters":
        """Returns the numbers as [] arrays on the device."""
        arrays = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), self)
        kind, seed = jnp.asarray(self.schedule.kind, jnp.int32), jnp.asarray(self.seed % 2**31, jnp.int32)
        return arrays._replace(schedule=arrays.schedule._replace(kind=kind), seed=seed)


def make_hyperparameters(
    schedule: Schedule,
    *,
    weight_decay: float,
    b1: float,
    b2: float,
    epsilon: float,
    clip_norm: float,
    loraplus_lr_ratio: float = 1.0,
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> Hyperparameters:
    """Returns the numbers of a run, of which `clip_norm` may be 0 for no clipping."""
    moments, clip_norm = (b1, b2, 1 - b1, 1 - b2, epsilon), clip_norm or float("inf")
    return Hyperparameters(schedule, weight_decay, *moments, clip_norm, loraplus_lr_ratio, lora_dropout, seed)


def make_optimizer(
    name: str,
    schedule: Schedule,
    *,
    weight_decay: float,
    b1: float,
    b2: float,
    epsilon: float,
    clip_norm: float,
    loraplus_lr_ratio: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns the chain of clipping by the gradients' global norm, the update rule, and decoupled weight decay.

    Only matrices decay. The optimizer's state is float32 if it is given float32 gradients and parameters, whatever the
    model's dtype is. `update` takes two more arguments: `grad_norm`, if it is known already, and `hyperparameters`,
    whose numbers take the place of those given here. The structure of the state depends on whether `clip_norm` is 0 and
    `loraplus_lr_ratio` is 1. With `adafactor`, so does what is computed, and also on whether `weight_decay` is 0.

    Args:
        name: `adamw`, `lion`, `adafactor` or `sgd`.
        schedule: Learning rate by step.
        weight_decay, b1, b2, epsilon, loraplus_lr_ratio: Numbers as in `Hyperparameters`.
        clip_norm: Largest global norm of the gradients; 0: no clipping.
    """
    numbers = make_hyperparameters(
        schedule,
        weight_decay=weight_decay,
        b1=b1,
        b2=b2,
        epsilon=epsilon,
        clip_norm=clip_norm,
        loraplus_lr_ratio=loraplus_lr_ratio,
    )
    clips, has_ratio, decays = bool(clip_norm), loraplus_lr_ratio != 1, bool(weight_decay)

    def chain(numbers: Hyperparameters) -> optax.GradientTransformation:
        rule = _adafactor(numbers, decays) if name == "adafactor" else _RULES[name](numbers)
        if has_ratio:
            rule = optax.chain(rule, _scale_second_factors(numbers) if name == "adafactor" else optax.identity())
        return optax.chain(_clip_by_global_norm(numbers.clip_norm), rule) if clips else rule

    def update(updates: Any, state: Any, params: Any = None, *, hyperparameters: Any = None, **more: Any) -> tuple:
        return optax.with_extra_args_support(chain(hyperparameters or numbers)).update(updates, state, params, **more)

    return optax.GradientTransformationExtraArgs(chain(numbers).init, update)


def _adamw(numbers: Hyperparameters) -> optax.GradientTransformation:
    return _with_decay_and_rate(
        scale_by_adam(numbers.b1, numbers.b2, numbers.one_minus_b1, numbers.one_minus_b2, numbers.epsilon), numbers
    )


def _lion(numbers: Hyperparameters) -> optax.GradientTransformation:
    return _with_decay_and_rate(
        scale_by_lion(numbers.b1, numbers.b2, numbers.one_minus_b1, numbers.one_minus_b2), numbers
    )


def _sgd(numbers: Hyperparameters) -> optax.GradientTransformation:
    return _with_decay_and_rate(optax.trace(decay=numbers.b1), numbers)


_RULES = {"adamw": _adamw, "lion": _lion, "sgd": _sgd}


def _adafactor(numbers: Hyperparameters, decays: bool) -> optax.GradientTransformation:
    decay = numbers.weight_decay if decays else None
    return optax.adafactor(numbers.schedule, weight_decay_rate=decay, weight_decay_mask=is_matrix)


def _with_decay_and_rate(rule: optax.GradientTransformation, numbers: Hyperparameters) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(numbers.weight_decay, mask=is_matrix)
    return optax.chain(rule, decay, _scale_by_rates(numbers))


def _scale_by_rates(numbers: Hyperparameters) -> optax.GradientTransformation:
    """Multiplies by the negative learning rate of the step, of LoRA's second factors by one of their own (LoRA+)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        del params
        rate, ratio = -1 * numbers.schedule(state.count), numbers.loraplus_lr_ratio
        # First the ratio: where it is 1, the product is exact, and what follows as without it.
        scaled = {path: rate * (ratio * update if _is_second(path) else update) for path, update in updates.items()}
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(optax.scale_by_schedule(numbers.schedule).init, update)


def _scale_second_factors(numbers: Hyperparameters) -> optax.GradientTransformation:
    ratio = numbers.loraplus_lr_ratio
    return optax.stateless(
        lambda updates, _: {path: update * (ratio if _is_second(path) else 1) for path, update in updates.items()}
    )


def _is_second(path: str) -> bool:
    return path.endswith(("/lora_kernel_b", "/lora_embeddings_b"))


def _clip_by_global_norm(most: _Number) -> optax.GradientTransformation:
    """Like Optax's `clip_by_global_norm`, but takes the norm as `grad_norm` if it is known already."""

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **others: Any) -> tuple:
        del params, others
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(lambda update: update * jnp.minimum(1.0, most / norm), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    """Returns for each parameter whether it decays.

    Kernels and embeddings do; norms, biases and other vectors don't, and neither do DoRA's magnitudes: they are lengths
    of vectors, though their shape may be [heads, width].
    """
    return {path: jnp.ndim(value) >= 2 and not path.endswith("_magnitude") for path, value in params.items()}


def as_float32(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the values of a dict in float32."""
    return {path: value.astype(jnp.float32) for path, value in tree.items()}
