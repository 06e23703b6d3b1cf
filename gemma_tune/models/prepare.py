"""What is done to a loaded model before it is trained, in its fixed order."""

from typing import NamedTuple

from gemma_tune.keras_runtime import keras
from gemma_tune.models.attention import use_causal_attention
from gemma_tune.models.attention_choice import AttentionChoice, choose_attention
from gemma_tune.models.functional import check_text_only
from gemma_tune.models.linear import use_plain_products
from gemma_tune.models.lora import enable_lora, merge_lora
from gemma_tune.models.packing import enable_packing
from gemma_tune.models.remat import enable_remat


class LoraSettings(NamedTuple):
    """LoRA factors, as in `config.LoraConfig`."""

    rank: int
    alpha: float
    target_layers: tuple[str, ...]
    seed: int


def prepare_for_training(
    model: keras.Model, lora: LoraSettings | None, *, packing: bool, remat: str, attention: str, row_length: int
) -> AttentionChoice:
    """Swaps parts of a model for those that train faster and leaner; what it computes stays the same.

    Args:
        model: From `load_model`. Factors of an earlier run are merged.
        lora: None trains all weights.
        packing: Several examples in a row.
        remat: `none`, `blocks` or `full`.
        attention: `auto`, `blocks`, `cudnn`, `splash` or `keras`.
        row_length: Positions L of a row.

    Returns:
        The attention kernel that it came to.

    Raises:
        ModelError: The model doesn't run on text alone, no layer has one of the names, or a part can't be swapped.
    """
    merge_lora(model.backbone)
    check_text_only(model)
    if lora:
        enable_lora(model.backbone, *lora)
    use_plain_products(model.backbone)
    choice = choose_attention(model.backbone, attention, row_length)
    if packing or choice.kernel == "splash":
        enable_packing(model.backbone)
    use_causal_attention(model.backbone, choice.kernel)
    enable_remat(model.backbone, remat)
    return choice
