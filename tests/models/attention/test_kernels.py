"""All attention kernels give the same. Without their devices, splash attention runs interpreted, and what is handed to
cuDNN is computed by XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import lora_model, num_targets, random_batch

from gemma_tune.models.attention.choice import compile_problem, first_device, kernel_problem
from gemma_tune.models.attention.kernels import causal_attention, cudnn_attention, splash_attention
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.attention.swap import AttentionShape, use_attention_kernel
from gemma_tune.models.functional import parameters
from gemma_tune.models.remat import enable_remat
from gemma_tune.training.step.loss import make_loss_fn

LENGTH = 256


def random_row(rng, num_kv_heads, dtype=np.float32):
    """Returns q, k, v and segment ids of two rows with three segments; in one row the last segment is padding."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, LENGTH, heads, 16)), dtype) for heads in (4, num_kv_heads, num_kv_heads))
    return q, k, v, jnp.asarray([[1] * 100 + [2] * 90 + [3] * 66, [1] * 140 + [2] * 46 + [0] * 70], jnp.int32)


def packed_mask(segment_ids, window=None):
    """Returns which keys a query sees: those of its segment, before it, within the window. Padding sees none."""
    distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
    near = (distance >= 0) & (distance < (window or LENGTH))
    return near & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]


def output_and_gradients(attention, q, k, v, is_token):
    """Returns the outputs and gradients of positions other than padding, for a cotangent that differs everywhere."""
    cotangent = jnp.sin(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape)

    def total(q, k, v):
        attended = jnp.where(is_token[:, :, None, None], attention(q, k, v), 0)
        return jnp.sum(attended * cotangent), attended

    (_, attended), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [attended, *gradients]


def assert_close(found, wanted, tolerance):
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize(
    ("num_kv_heads", "window", "soft_cap"),
    [(1, None, None), (2, None, None), (4, None, 3.0), (1, 16, None), (2, 16, 3.0), (2, 200, None), (1, 256, None)],
)
def test_splash_is_causal_attention(rng, num_kv_heads, window, soft_cap):
    q, k, v, segment_ids = random_row(rng, num_kv_heads)
    mask, options = packed_mask(segment_ids, window), {"scale": 0.3, "soft_cap": soft_cap}
    splash = lambda q, k, v: splash_attention(q, k, v, segment_ids, window=window, interpret=True, **options)
    found = output_and_gradients(splash, q, k, v, segment_ids > 0)
    wanted = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, mask, **options), q, k, v, segment_ids > 0)
    # float32 with a running softmax: sums in another order.
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 16])
def test_what_cudnn_is_given_is_causal_attention(rng, num_kv_heads, window):
    q, k, v, segment_ids = random_row(rng, num_kv_heads)
    mask = packed_mask(segment_ids, window)
    cudnn = lambda q, k, v: cudnn_attention(q, k, v, mask, scale=0.3, implementation="xla")
    found = output_and_gradients(cudnn, q, k, v, segment_ids > 0)
    wanted = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, mask, scale=0.3), q, k, v, segment_ids > 0)
    assert_close(found, wanted, 1e-5)


def test_no_row_that_cudnn_is_given_looks_nowhere(rng):
    """Else padding would have no finite log-sum-exp, and its gradients would be NaN."""
    q, k, v, segment_ids = random_row(rng, 1)
    attended = cudnn_attention(q, k, v, packed_mask(segment_ids), scale=0.3, implementation="xla")
    padding = segment_ids == 0
    np.testing.assert_allclose(attended[padding], jnp.broadcast_to(v, q.shape)[padding], atol=1e-6)


# Query heads, key/value heads, head width, dtype, window and cap of Gemma 3 1B, 2 2B, 2 27B and a global layer of 4.
REAL_SHAPES = [(4, 1, 256, "bfloat16", 512, None), (8, 4, 256, "float32", 4096, 50.0), (32, 16, 128, "bfloat16", None, 50.0), (8, 2, 512, "bfloat16", None, None)]  # fmt: skip


def gradients_of(attention, num_heads, num_kv_heads, head_width, dtype, last):
    """Returns the jitted gradient, and the shapes to lower it for: rows of 1024 positions, and `last`."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, head_width), dtype) for heads in (num_heads, num_kv_heads))
    total = lambda q, k, v, last: attention(q, k, v, last).astype(jnp.float32).sum()
    return jax.jit(jax.grad(total, (0, 1, 2))), (q, k, k, last)


@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_splash_lowers_for_a_tpu(shape):
    """Forward pass, and backward pass in two kernels, at the widths of real models, which take too long interpreted."""
    *heads, window, soft_cap = shape
    splash = lambda q, k, v, ids: splash_attention(q, k, v, ids, scale=0.1, window=window, soft_cap=soft_cap)
    gradients, shapes = gradients_of(splash, *heads, jax.ShapeDtypeStruct((2, 1024), "int32"))
    program = jax.export.export(gradients, platforms=["tpu"])(*shapes).mlir_module()
    assert program.count("tpu_custom_call") == 3


def test_cudnn_lowers_for_a_gpu(monkeypatch):
    """Pretends that there is a Hopper GPU: JAX accepts the arguments, and calls cuDNN forward and backward."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    attention = lambda q, k, v, mask: cudnn_attention(q, k, v, mask, scale=0.1)
    mask = jax.ShapeDtypeStruct((2, 1024, 1024), bool)
    gradients, shapes = gradients_of(attention, 4, 1, 256, "bfloat16", mask)
    program = gradients.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaScaleBiasSoftmax(" in program and "fmhaScaleBiasSoftmaxBackward(" in program
    assert "CAUSAL" in program


def value_and_gradients(model, trainable, frozen, batch):
    loss_fn = make_loss_fn(model, num_targets(batch))
    return jax.jit(jax.value_and_grad(lambda trainable: loss_fn(trainable, frozen, batch).loss_sum))(trainable)


def test_splash_in_a_model_is_keras_hubs_attention(tiny, some_family, rng):
    """Packed and padded rows of 128 positions, longer than the tiny models' windows, with remat of the blocks."""
    model, trainable, frozen = lora_model(tiny, some_family, rng, ("attention",))
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (128, 90), 2, 128))
    batch = batch._replace(segment_ids=batch.segment_ids + (batch.segment_ids > 0) * (jnp.arange(128) > 60))
    enable_packing(model.backbone)
    wanted, gradients = value_and_gradients(model, trainable, frozen, batch)
    use_attention_kernel(model.backbone, "splash")
    enable_remat(model.backbone, "full")
    found, ours = value_and_gradients(model, trainable, frozen, batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for path, gradient in gradients.items():
        # The same sums in another order; Gemma 4 magnifies roundings the most.
        np.testing.assert_allclose(ours[path], gradient, atol=5e-4 * np.abs(gradient).max(), err_msg=path)


def test_splash_holds_no_mask(tiny, rng):
    """No array of L·L elements, scores or mask, is in the whole program: the kernel's tiles are smaller."""
    model, trainable, frozen = lora_model(tiny, "gemma3", rng)
    enable_packing(model.backbone)
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (300,), 1, 384))
    programs = []
    for kernel in ("xla", "splash"):
        use_attention_kernel(model.backbone, kernel)
        loss_fn = make_loss_fn(model, num_targets(batch))
        programs.append(str(jax.make_jaxpr(lambda trainable, f=loss_fn: f(trainable, frozen, batch))(trainable)))
    assert "384,384]" in programs[0] and "384,384]" not in programs[1]


def test_rows_of_other_lengths_take_causal_blocks(tiny, rng):
    model, trainable, frozen = lora_model(tiny, "gemma", rng)
    enable_packing(model.backbone)
    batch = random_batch(rng)
    losses = []
    for kernel in ("keras", "xla", "splash", "cudnn"):
        use_attention_kernel(model.backbone, kernel)
        loss_fn = jax.jit(make_loss_fn(model, num_targets(batch)))
        losses.append(float(loss_fn(trainable, frozen, batch).loss_sum))
    assert losses[1:] == [losses[1]] * 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_generating_is_left_alone(tiny, family):
    model = tiny(family)
    before = model.generate("How do I", max_length=12)
    for _ in range(2):  # Twice changes nothing.
        enable_packing(model.backbone)
        use_attention_kernel(model.backbone, "splash")
    model.generate_function = None
    assert model.generate("How do I", max_length=12) == before


@pytest.fixture
def needs_cudnn():
    shape = AttentionShape(4, 1, 16, "bfloat16", 0.3, None, None)
    problem = kernel_problem("cudnn", first_device(), [shape], LENGTH) or compile_problem("cudnn", [shape], LENGTH)
    if problem:
        pytest.skip(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
def test_cudnn_on_a_gpu(needs_cudnn, rng, window):
    q, k, v, segment_ids = random_row(rng, 1, jnp.bfloat16)
    mask = packed_mask(segment_ids, window)
    found = output_and_gradients(lambda q, k, v: cudnn_attention(q, k, v, mask, scale=0.3), q, k, v, segment_ids > 0)
    wanted = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, mask, scale=0.3), q, k, v, segment_ids > 0)
    # bfloat16 has 8 bits; gradients go through three products of it.
    assert_close(found, wanted, 3e-2)


@pytest.mark.gpu
def test_cudnn_in_a_model_on_a_gpu(needs_cudnn, tiny, rng):
    model = tiny("gemma3", precision="bfloat16")
    groups = parameters(model)
    enable_packing(model.backbone)
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (128, 90), 2, 128))
    losses = []
    for kernel in ("xla", "cudnn"):
        use_attention_kernel(model.backbone, kernel)
        loss, gradients = value_and_gradients(model, groups.trainable, groups.frozen, batch)
        assert all(bool(jnp.isfinite(gradient).all()) for gradient in gradients.values())
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (16, 3.0)])
def test_splash_on_a_tpu(rng, window, soft_cap):
    if jax.default_backend() != "tpu":
        pytest.skip(f"splash attention needs a TPU, this is {jax.default_backend()}")
    q, k, v, segment_ids = random_row(rng, 1)
    mask, options = packed_mask(segment_ids, window), {"scale": 0.3, "soft_cap": soft_cap}
    splash = lambda q, k, v: splash_attention(q, k, v, segment_ids, window=window, **options)
    found = output_and_gradients(splash, q, k, v, segment_ids > 0)
    wanted = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, mask, **options), q, k, v, segment_ids > 0)
    # Products of float32 on a TPU are of bfloat16 unless asked otherwise.
    assert_close(found, wanted, 3e-2)
