"""What is done to a loaded model before it is trained, in its fixed order."""

from typing import NamedTuple

from gemma_tune.config import LoraConfig
from gemma_tune.errors import ModelError
from gemma_tune.keras_runtime import jax, keras
from gemma_tune.models.attention import use_causal_attention
from gemma_tune.models.attention_choice import AttentionChoice, choose_attention
from gemma_tune.models.blocks import can_be_split
from gemma_tune.models.functional import check_text_only
from gemma_tune.models.linear import use_plain_products
from gemma_tune.models.lora import enable_lora, lora_layers, merge_lora
from gemma_tune.models.packing import enable_packing
from gemma_tune.models.qat import disable_qat, enable_qat
from gemma_tune.models.quantize import quantized_layers
from gemma_tune.models.remat import enable_remat
from gemma_tune.models.rotary import use_rotary_tables
from gemma_tune.models.sharded_layers import use_mesh
from gemma_tune.models.sharding import Layout
from gemma_tune.quantization.scheme import Grid

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


class Prepared(NamedTuple):
    """What preparing a model came to.

    program: `whole` or `blocks`. For `blocks` the steps are to be made with `training.blockwise.Blockwise`, which then
        recomputes; in a whole program the model's blocks do it themselves. attention: The kernel.
    """

    program: str
    attention: AttentionChoice


def prepare_for_training(
    model: keras.Model,
    lora: LoraSettings | None,
    *,
    qat: Grid | None = None,
    packing: bool,
    remat: str,
    row_length: int,
    attention: str = "auto",
    program: str = "auto",
    layout: Layout | None = None,
    keeps_factors: bool = False,
) -> Prepared:
    """Swaps parts of a model for those that train faster and leaner; but for `qat`, what it computes stays the same.

    Args:
        model: From `load_model`. Factors of an earlier run are merged, unless `keeps_factors`.
        lora: None trains all weights.
        qat: Computes with weights rounded so, and trains those behind them.
        packing: Several examples in a row.
        remat: `none`, `blocks` or `full`.
        row_length: Positions L of a row.
        attention: `auto`, `blocks`, `cudnn`, `splash` or `keras`.
        program: `whole`, `blocks`, or `auto`: blocks on CPU where the model allows it, else whole.
        layout: Of the mesh that the model is on.
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
    use_causal_attention(model.backbone, choice.kernel)
    if _takes_blocks(model, program, layout):
        return Prepared("blocks", choice)
    if layout:
        layout.place(model.backbone)  # What came since it was loaded: LoRA's factors.
        use_mesh(model.backbone, layout)
    enable_remat(model.backbone, remat)
    return Prepared("whole", choice)


def _check_floats(model: keras.Model) -> None:
    """Raises ModelError if weights are held in few bits."""
    if quantized := quantized_layers(model.backbone):
        raise ModelError(
            f"The model's weights are held in {quantized[0].quantized_scheme}, so they can't all be trained. Take "
            "training.method=qlora, which trains LoRA beside them, or the float model that it was made from."
        )


def _takes_blocks(model: keras.Model, program: str, layout: Layout | None) -> bool:
    """Says what `program` comes to, or raises ModelError if it is `blocks` and the model can't be split."""
    wants_blocks = program == "blocks" or (program == "auto" and jax.default_backend() == "cpu" and layout is None)
    if wants_blocks and can_be_split(model.backbone):
        return True
    if program == "blocks":
        raise ModelError(
            f"The blocks of {type(model.backbone).__name__} don't just follow one another. Set training.program=whole."
        )
    return False
