"""What is done to a loaded model before it is trained, in its fixed order."""

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
from gemma_tune.models.lora.enable import enable_lora, merge_lora
from gemma_tune.models.quantized.qat import disable_qat, enable_qat
from gemma_tune.models.remat import enable_remat
from gemma_tune.models.sharding.layers import enable_mesh_sharding
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import jax, keras

_LORA = LoraConfig()


class LoraSettings(NamedTuple):
    """LoRA factors, as in `config.LoraConfig`, and the seed of A."""

    rank: int
    alpha: float
    target_layers: tuple[str, ...]
    seed: int
    layout: str = _LORA.layout
    use_rslora: bool = _LORA.use_rslora
    use_dora: bool = _LORA.use_dora


class Transformed(NamedTuple):
    """What preparing a model came to.

    program: `whole` or `per_block`. For `per_block` the steps are to be made with `training.blockwise.PerBlockProgram`, which then
        recomputes; in a whole program the model's blocks do it themselves. attention: The kernel.
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
) -> Transformed:
    """Swaps parts of a model for those that train faster and leaner; but for `qat`, what it computes stays the same.

    Args:
        model: From `load_model`. Factors of an earlier run are merged, unless `keeps_factors`.
        lora: None trains all weights.
        qat: Computes with weights rounded so, and trains those behind them.
        packing: Several examples in a row.
        remat: `none`, `dots` or `full`.
        row_length: Positions L of a row.
        attention: `auto`, `xla`, `cudnn`, `splash` or `keras`.
        program: `whole`, `per_block`, or `auto`: per_block on CPU where the model allows it, else whole.
        sharding: Where the model lies on a mesh. None: one device.
        keeps_factors: With `lora`, the factors that the model has go on being trained, as they are.

    Returns:
        What to make the steps with, and the attention kernel that it came to.

    Raises:
        ModelError: The model doesn't run on text alone, no layer has one of the names, a layer doesn't fit the
            grid, or a part can't be swapped.
    """
    keeps_factors = keeps_factors and bool(lora and lora_layers(model.backbone))
    if not keeps_factors:
        merge_lora(model.backbone)
    disable_qat(model.backbone)
    check_text_only(model)
    if not lora:
        _check_floats(model)
    elif not keeps_factors:
        enable_lora(model.backbone, *lora)
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
        sharding.place(model.backbone)  # What came since it was loaded: LoRA's factors.
        enable_mesh_sharding(model.backbone, sharding)
    enable_remat(model.backbone, remat)
    return Transformed("whole", choice)


def _check_floats(model: keras.Model) -> None:
    """Raises ModelError if weights are held in few bits."""
    if quantized := quantized_layers(model.backbone):
        raise ModelError(
            f"The model's weights are held in {quantized[0].quantized_scheme}, so they can't all be trained. Take "
            "training.method=qlora, which trains LoRA beside them, or the float model that it was made from."
        )


def _takes_per_block(model: keras.Model, program: str, sharding: MeshSharding | None) -> bool:
    """Says what `program` comes to, or raises ModelError if it is `per_block` and the model can't be split."""
    wants_blocks = program == "per_block" or (program == "auto" and jax.default_backend() == "cpu" and sharding is None)
    if wants_blocks and blocks_are_sequential(model.backbone):
        return True
    if program == "per_block":
        raise ModelError(
            f"The blocks of {type(model.backbone).__name__} don't just follow one another. Set training.program=whole."
        )
    return False
