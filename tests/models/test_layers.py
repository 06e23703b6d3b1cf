"""The layers of a backbone, found by what they are."""

from pathlib import Path

import gemma_tune
from gemma_tune.models.layers import iter_layers, linear_layers, lora_layers, quantizable_layers, quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras


def test_each_selection_finds_its_layers():
    backbone = load_model("tiny").backbone
    blocks = backbone.transformer_layers
    linear = linear_layers(backbone)
    assert len(linear) == 7 * len(blocks) and all(isinstance(layer, keras.layers.EinsumDense) for layer in linear)
    assert {id(layer) for layer in linear} == {id(layer) for block in blocks for layer in linear_layers(block)}
    assert {id(layer) for layer in quantizable_layers(backbone)} == {id(x) for x in (*linear, backbone.token_embedding)}
    assert not quantized_layers(backbone) and not lora_layers(backbone)
    assert backbone not in iter_layers(backbone) and blocks[0] in iter_layers(backbone)

    quantize_layers(backbone, QuantSpec("int8"))
    assert quantized_layers(backbone) == quantizable_layers(backbone)
    enable_lora(backbone, 2, 2.0, ("query", "value"), seed=0)
    assert sorted(layer.name for layer in lora_layers(backbone)) == ["query"] * len(blocks) + ["value"] * len(blocks)


def test_keras_private_walk_is_called_in_one_place():
    calling = [
        path.name
        for path in Path(gemma_tune.__file__).parent.rglob("*.py")
        if "._flatten_layers(" in path.read_text(encoding="utf-8")
    ]
    assert calling == ["layers.py"]
