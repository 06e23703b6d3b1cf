"""The learning rate schedule and the optimizer, from Optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_schedule(name: str, learning_rate: float, warmup_steps: int, num_train_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up from zero, then constant, or falling to zero at the last step.

    Args:
        name: `constant`, `linear` or `cosine`.
        learning_rate: Peak learning rate.
        warmup_steps: Number of warm-up steps; at most half of the run, so that short runs also reach the peak.
        num_train_steps: Number of steps of the run.
    """
    warmup_steps = min(warmup_steps, num_train_steps // 2)
    rest = max(num_train_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest),
    }[name]()
    if not warmup_steps:
        return after
    # The first step gets 1/warmup_steps of the peak, not zero.
    warmup = (
        optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
        if warmup_steps > 1
        else after
    )
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    b1: float,
    b2: float,
    epsilon: float,
    clip_norm: float,
    loraplus_lr_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Returns the chain of clipping by the gradients' global norm, the update rule, and decoupled weight decay.

    Only matrices decay. The optimizer's state is float32 if it is given float32 gradients and parameters, whatever the
    model's dtype is.

    Args:
        name: `adamw`, `lion`, `adafactor` or `sgd`.
        schedule: Learning rate by step.
        weight_decay: Factor of the weight decay.
        b1: Decay of the first moment; of `sgd`, momentum.
        b2: Decay of the second moment.
        epsilon: Term in AdamW's denominator.
        clip_norm: Largest global norm of the gradients; 0: no clipping.
        loraplus_lr_ratio: Factor of the learning rate for LoRA's second factors (LoRA+, arXiv:2402.12354).
    """
    decay = {"weight_decay": weight_decay, "mask": is_matrix}
    rule = {
        "adamw": lambda: optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, **decay),
        "lion": lambda: optax.lion(schedule, b1=b1, b2=b2, **decay),
        "adafactor": lambda: optax.adafactor(
            schedule, weight_decay_rate=weight_decay or None, weight_decay_mask=is_matrix
        ),
        "sgd": lambda: optax.chain(
            optax.trace(decay=b1),
            optax.add_decayed_weights(weight_decay, mask=is_matrix),
            optax.scale_by_learning_rate(schedule),
        ),
    }[name]()
    if loraplus_lr_ratio != 1:
        rule = optax.chain(rule, _scale_second_factors(loraplus_lr_ratio))
    return optax.chain(_clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def _scale_second_factors(ratio: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: {path: update * (ratio if _is_second(path) else 1) for path, update in updates.items()}
    )


def _is_second(path: str) -> bool:
    return path.endswith(("/lora_kernel_b", "/lora_embeddings_b"))


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
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
