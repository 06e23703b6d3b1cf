"""Transforms a loaded model for training, in a fixed order: LoRA, QAT, attention, packing, sharding, remat."""

from typing import NamedTuple

from gemma_tune.config import LoraConfig
from gemma_tune.errors import ModelError
from gemma_tune.models.attention.choice import AttentionChoice, choose_attention
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.attention.swap import use_attention_kernel
from gemma_tune.models.blocks import blocks_are_sequential
from gemma_tune.models.cpu.rotary_tables import use_rotary_tables
from gemma_tune.models.functional import check_text_only
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.linear import use_plain_products
from gemma_tune.models.lora.dropout import enable_dropout
from gemma_tune.models.lora.enable import enable_lora, merge_lora
from gemma_tune.models.lora.layers import make_scale_an_input
from gemma_tune.models.quantized.qat import disable_qat, enable_qat
from gemma_tune.models.remat import enable_remat
from gemma_tune.models.sharding.layers import enable_mesh_sharding
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import jax, keras

_LORA = LoraConfig()


class LoraSettings(NamedTuple):
    """Settings of LoRA, as in `config.LoraConfig`.

    Attributes:
        rank: Rank R of the factors.
        alpha: Numerator of the scaling factor.
        target_layers: Names of the layers, or of groups of layers, that get factors.
        seed: Random seed of A.
        layout: Layout of the factors.
        use_rslora: Whether the scaling factor is alpha / sqrt(R), not alpha / R.
        use_dora: Whether a magnitude is trained for each output.
    """

    rank: int
    alpha: float
    target_layers: tuple[str, ...]
    seed: int
    layout: str = _LORA.layout
    use_rslora: bool = _LORA.use_rslora
    use_dora: bool = _LORA.use_dora


class Transformed(NamedTuple):
    """The choices that `transform_for_training` made.

    Attributes:
        program: `whole` or `per_block`. The steps of a `per_block` model are made with
            `training.step.per_block.per_block_program`, which also recomputes activations; in a `whole` program the
            model's decoder blocks do that themselves.
        attention: Attention kernel.
    """

    program: str
    attention: AttentionChoice


def transform_for_training(
    model: keras.Model,
    lora: LoraSettings | None,
    *,
    qat: QuantSpec | None = None,
    packing: bool,
    remat: str,
    row_length: int,
    attention: str = "auto",
    program: str = "auto",
    sharding: MeshSharding | None = None,
    keeps_factors: bool = False,
    alpha_is_input: bool = False,
    dropout: bool = False,
) -> Transformed:
    """Swaps parts of a model for faster and leaner ones. Unless `qat` is given, the model computes the same as before.

    Args:
        model: CausalLM of `load_model`. LoRA factors of an earlier run are merged, unless `keeps_factors`.
        lora: Settings of LoRA. None: all weights are trained.
        qat: Quantization spec of quantization-aware training: the model computes with rounded weights, and trains the
            float weights behind them.
        packing: Whether a row holds several examples.
        remat: Which activations are recomputed: `none`, `dots` or `full`.
        row_length: Tokens L in a row.
        attention: Attention kernel: `auto`, `xla`, `cudnn`, `splash` or `keras`.
        program: `whole`, `per_block`, or `auto`: per_block on a CPU if the model allows it, else whole.
        sharding: Mesh sharding of the model. None: one device.
        keeps_factors: Whether the LoRA factors that the model has are trained further, if `lora` is given.
        alpha_is_input: Whether programs take LoRA's scale as an input, so that alpha may be changed with `set_alpha`.
            Only for factors of linear layers, and not with `qat`.
        dropout: Whether the input of LoRA's first factor may have dropout, at a rate that each training step takes. Not
            with `qat`.

    Returns:
        The program and the attention kernel that were chosen.

    Raises:
        ModelError: The model takes more than text, no layer has one of the target names, a layer doesn't fit the
            quantization spec, or a part can't be swapped.
    """
    _prepare_factors(model, lora, keeps_factors)
    for layer in lora_layers(model.backbone) if alpha_is_input else ():
        make_scale_an_input(layer)
    if dropout and lora:
        enable_dropout(model.backbone)
    use_plain_products(model.backbone)
    use_rotary_tables(model.backbone)
    if qat:
        enable_qat(model.backbone, qat)
    choice = choose_attention(model.backbone, attention, row_length)
    if packing or choice.kernel == "splash":
        enable_packing(model.backbone)
    use_attention_kernel(model.backbone, choice.kernel)
    if _takes_per_block(model, program, sharding):
        return Transformed("per_block", choice)
    if sharding:
        sharding.place(model.backbone)  # LoRA's factors are new since it was loaded.
        enable_mesh_sharding(model.backbone, sharding)
    enable_remat(model.backbone, remat)
    return Transformed("whole", choice)


def _prepare_factors(model: keras.Model, lora: LoraSettings | None, keeps_factors: bool) -> None:
    """Merges LoRA factors of an earlier run and adds new ones, or keeps those that are there."""
    keeps_factors = keeps_factors and bool(lora and lora_layers(model.backbone))
    if not keeps_factors:
        merge_lora(model.backbone)
    disable_qat(model.backbone)
    check_text_only(model)
    if not lora:
        _check_floats(model)
    elif not keeps_factors:
        enable_lora(model.backbone, *lora)


def _check_floats(model: keras.Model) -> None:
    """Raises ModelError if weights are quantized."""
    if quantized := quantized_layers(model.backbone):
        raise ModelError(
            f"The model's weights are quantized to {quantized[0].quantized_scheme}, so they can't all be trained. Set "
            "training.method=qlora, which trains LoRA on top of them, or load the float model that it was made from."
        )


def _takes_per_block(model: keras.Model, program: str, sharding: MeshSharding | None) -> bool:
    """Returns whether a program is compiled for each decoder block.

    Raises:
        ModelError: `program` is `per_block`, and the model can't be split.
    """
    wants_blocks = program == "per_block" or (program == "auto" and jax.default_backend() == "cpu" and sharding is None)
    if wants_blocks and blocks_are_sequential(model.backbone):
        return True
    if program == "per_block":
        raise ModelError(
            f"The decoder blocks of {type(model.backbone).__name__} are not a plain sequence. Set "
            "training.program=whole."
        )
    return False
