"""The chosen attention kernel can run, and the choice says why it isn't a faster one."""

import types

import jax
import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.attention import choice as attention_choice
from gemma_tune.models.attention.choice import (
    AttentionChoice,
    Device,
    choose_attention,
    compile_problem,
    kernel_problem,
)
from gemma_tune.models.attention.swap import AttentionShape, attention_shape_of
from gemma_tune.models.transforms import transform_for_training

HOPPER, AMPERE, TURING = (Device("cuda", capability) for capability in ((9, 0), (8, 0), (7, 5)))
TPU, CPU, ROCM = (Device(platform) for platform in ("tpu", "cpu", "rocm"))
GEMMA3 = AttentionShape(4, 1, 256, "bfloat16", 256**-0.5, None, 512)
GEMMA3_27B = GEMMA3._replace(head_width=128)
GEMMA2 = GEMMA3._replace(soft_cap=50.0)
GEMMA4_GLOBAL = GEMMA3._replace(head_width=512, scale=1.0)


@pytest.mark.parametrize(
    ("kernel", "device", "shape", "row_length", "reason"),
    [
        ("cudnn", HOPPER, GEMMA3, 512, ""),
        ("cudnn", HOPPER, GEMMA3._replace(dtype="float16"), 512, ""),
        ("cudnn", Device("cuda", (12, 0)), GEMMA3, 512, ""),
        ("cudnn", HOPPER, GEMMA3._replace(dtype="float32"), 512, "cuDNN needs float16 or bfloat16, this is float32"),
        ("cudnn", HOPPER, GEMMA2, 512, "cuDNN has no soft cap of scores, this model has one of 50"),
        ("cudnn", HOPPER, GEMMA4_GLOBAL, 512, "a multiple of 8, at most 256 on this GPU, this is 512"),
        ("cudnn", HOPPER, GEMMA3._replace(head_width=20), 512, "a multiple of 8, at most 256 on this GPU, this is 20"),
        ("cudnn", HOPPER, GEMMA3, 511, "cuDNN needs rows of a multiple of 128 tokens, these have 511"),
        ("cudnn", HOPPER, GEMMA3, 192, "cuDNN needs rows of a multiple of 128 tokens, these have 192"),
        ("cudnn", AMPERE, GEMMA3, 512, "a multiple of 8, at most 128 on this GPU, this is 256"),
        ("cudnn", AMPERE, GEMMA3_27B, 512, ""),
        ("cudnn", TURING, GEMMA3_27B, 512, "cuDNN needs compute capability 8.0, this GPU has 7.5"),
        ("cudnn", CPU, GEMMA3, 512, "cuDNN needs an NVIDIA GPU, this is cpu"),
        ("cudnn", TPU, GEMMA3, 512, "cuDNN needs an NVIDIA GPU, this is tpu"),
        ("cudnn", ROCM, GEMMA3, 512, "cuDNN needs an NVIDIA GPU, this is rocm"),
        ("splash", TPU, GEMMA3, 512, ""),
        ("splash", TPU, GEMMA2._replace(dtype="float32"), 512, ""),
        ("splash", TPU, GEMMA3, 500, "splash attention needs rows of a multiple of 128 tokens, these have 500"),
        ("splash", HOPPER, GEMMA3, 512, "splash attention needs a TPU, this is cuda"),
        ("splash", CPU, GEMMA3, 512, "splash attention needs a TPU, this is cpu"),
    ],
)
def test_known_limits(kernel, device, shape, row_length, reason):
    found = kernel_problem(kernel, device, [GEMMA3_27B, shape], row_length)
    assert found.endswith(reason) and bool(found) == bool(reason)


@pytest.fixture
def on(monkeypatch):
    """Pretends to run on a device on which every kernel compiles, or none does for the given reason."""

    def pretend(device, compiler_says=""):
        monkeypatch.setattr(attention_choice, "first_device", lambda: device)
        monkeypatch.setattr(attention_choice, "compile_problem", lambda *arguments: compiler_says)

    return pretend


@pytest.mark.parametrize(
    ("device", "family", "precision", "row_length", "kernel", "said"),
    [
        (CPU, "gemma3", "float32", 512, "xla", "XLA"),
        (ROCM, "gemma3", "bfloat16", 512, "xla", "XLA"),
        (HOPPER, "gemma3", "bfloat16", 512, "cudnn", "cuDNN"),
        (HOPPER, "gemma4", "mixed_bfloat16", 512, "cudnn", "cuDNN"),
        (HOPPER, "gemma3", "float32", 512, "xla", "XLA (cuDNN needs float16 or bfloat16, this is float32)"),
        (HOPPER, "gemma2", "bfloat16", 512, "xla", "XLA (cuDNN has no soft cap of scores, this model has one of 50)"),
        (TPU, "gemma2", "float32", 512, "splash", "splash attention"),
        (TPU, "gemma", "float32", 100, "xla", "XLA (splash attention needs rows of a multiple of 128 tokens, these have 100)"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_that_can_run(tiny, on, device, family, precision, row_length, kernel, said):
    on(device)
    choice = choose_attention(tiny(family, precision=precision).backbone, "auto", row_length)
    assert (choice.kernel, str(choice)) == (kernel, said)


def test_auto_falls_back_when_the_compiler_refuses(tiny, on):
    on(HOPPER, "cuDNN doesn't compile here: no engine")
    backbone = tiny("gemma3", precision="bfloat16").backbone
    assert choose_attention(backbone, "auto", 512) == ("xla", "cuDNN doesn't compile here: no engine")
    with pytest.raises(ModelError, match="no engine"):
        choose_attention(backbone, "cudnn", 512)


@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        (
            "cudnn",
            CPU,
            "training.attention=cudnn can't be used: cuDNN needs an NVIDIA GPU, this is cpu. Set training.att",
        ),
        ("splash", CPU, "training.attention=splash can't be used: splash attention needs a TPU, this is cpu"),
        ("keras", TPU, "KerasHub leaves out the soft cap"),
    ],
)
def test_what_is_asked_for_and_cannot_run_is_an_error(tiny, on, wanted, device, message):
    on(device)
    with pytest.raises(ModelError, match=message):
        choose_attention(tiny("gemma2").backbone, wanted, 512)


@pytest.mark.parametrize("wanted", ["xla", "keras"])
def test_what_is_asked_for_and_can_run_is_taken(tiny, on, wanted):
    on(HOPPER)
    assert choose_attention(tiny("gemma3", precision="bfloat16").backbone, wanted, 512) == (wanted, "")


def test_other_attention_stays_keras_hubs(tiny):
    backbone = tiny("gemma3").backbone
    unknown = types.SimpleNamespace(transformer_layers=[types.SimpleNamespace(attention=object())])
    assert choose_attention(unknown, "auto", 512) == ("keras", "this model's attention layers are not supported")
    backbone.transformer_layers[2].attention.dropout = 0.1
    assert choose_attention(backbone, "auto", 512) == ("keras", "this model's attention has dropout")
    with pytest.raises(ModelError, match=r"attention=xla can't be used: this model's attention has dropout"):
        choose_attention(backbone, "xla", 512)


def test_compiling_says_what_is_wrong():
    """On CPU, splash attention compiles when it is interpreted, and cuDNN doesn't."""
    shape = AttentionShape(4, 2, 16, "float32", 0.25, None, 16)
    assert compile_problem("splash", [shape], 128) == ""
    found = compile_problem("cudnn", [shape._replace(dtype="bfloat16")], 128)
    assert found.startswith("cuDNN doesn't compile here: ") and "\n" not in found


def test_shapes_are_read_from_the_layers(tiny, family):
    shapes = [attention_shape_of(block.attention) for block in tiny(family).backbone.transformer_layers]
    assert [shape.window for shape in shapes] == {
        "gemma": [None] * 3,
        "gemma2": [16, None] * 2,
        "gemma3": [16] * 5 + [None],
        "gemma4": [16, 16, None] * 2,
    }[family]
    assert {shape.head_width for shape in shapes} == ({16, 32} if family == "gemma4" else {16})
    assert {shape.num_kv_heads for shape in shapes} == {{"gemma": 1, "gemma3": 1}.get(family, 2)}


def test_preparing_returns_the_choice(tiny):
    choice = transform_for_training(
        tiny(), None, packing=True, remat="none", attention="auto", row_length=128
    ).attention
    assert choice == AttentionChoice("xla", "") and jax.default_backend() == "cpu"
