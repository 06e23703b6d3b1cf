"""The Config: defaults, checks that name the key, and the way there and back."""

import json

import pytest

from gemma_tune.config import Config, DataConfig, LoraConfig
from gemma_tune.errors import ConfigError
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.settings import flatten, setting_paths


def test_it_survives_json():
    config = Config().replace({"lora.target_layers": ["all-linear"], "optimizer.learning_rate": 1})
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.lora.target_layers == ("all-linear",) and config.optimizer.learning_rate == 1.0


def test_paths_and_values_agree():
    assert list(flatten(Config().to_dict())) == setting_paths(Config)


def test_a_missing_setting_takes_its_default():
    assert Config.from_dict({"lora": {"rank": 7}}).lora == LoraConfig(rank=7)


def test_method_defaults():
    assert Config().learning_rate == 10 * Config().replace({"training.method": "full"}).learning_rate
    assert Config().replace({"optimizer.learning_rate": 0.25}).learning_rate == 0.25
    assert Config().lora_alpha == Config().lora.rank
    assert Config().replace({"lora.alpha": 3.0}).lora_alpha == 3.0


def test_quantization_specs():
    """That of the weights as they are loaded, and that which quantization-aware training prepares for."""
    config = Config().replace({"model.block_size": 32})
    assert config.quant_spec is None and config.qat_spec is None
    aware = config.replace({"training.qat": "int4"})
    assert aware.quant_spec is None and aware.qat_spec == QuantSpec("int4", 32)
    assert config.replace({"training.method": "qlora"}).qat_spec is None


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Config().seed = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.rank": 0}, r"lora.rank must be at least 1, got 0"),
        ({"lora.rank": 2.5}, r"lora.rank must be a whole number, got 2.5"),
        ({"lora.rank": True}, r"lora.rank must be a whole number, got True"),
        ({"lora.target_layers": []}, r"lora.target_layers must name at least one layer"),
        ({"lora.target_layers": 3}, r"lora.target_layers must be a list of names, got 3"),
        ({"seed": "x"}, r"seed must be a whole number, got 'x'"),
        (
            {"training.method": "lorra"},
            r"training.method must be one of full, lora, qlora; got 'lorra'. Did you mean lora or qlora\?",
        ),
        (
            {"model.precision": "float64"},
            r"model.precision must be one of float32, bfloat16, float16, mixed_bfloat16, mixed_float16; got 'float64'. Did you mean",
        ),
        ({"optimizer.name": "adam"}, r"optimizer.name must be one of .*; got 'adam'. Did you mean adamw\?"),
        ({"optimizer.learning_rate": float("nan")}, r"optimizer.learning_rate must be a finite number, got nan"),
        ({"optimizer.learning_rate": -1.0}, r"optimizer.learning_rate must be at least 0"),
        ({"data.eval_fraction": 1.0}, r"data.eval_fraction must be at least 0 and below 1"),
        (
            {"data.row_length": 100},
            r"data.row_length must be 0 or at least data.max_length=512, with data.packing; got 100",
        ),
        ({"data.row_length": 1024, "data.packing": False}, r"data.row_length must be 0 or .* with data.packing"),
        (
            {"training.attention": "flash"},
            r"training.attention must be one of auto, xla, cudnn, splash, keras; got 'flash'",
        ),
        ({"training.remat": "all"}, r"training.remat must be one of none, dots, full; got 'all'"),
        ({"data.max_length": 4}, r"data.max_length must be at least 8"),
        ({"generation.top_p": 0.0}, r"generation.top_p must be above 0"),
        (
            {"training.batch_size": 4, "training.grad_accum_steps": 3},
            r"grad_accum_steps must divide training.batch_size, got 3 and 4",
        ),
        (
            {"training.early_stopping_patience": 2, "training.eval_every_steps": 0},
            r"early_stopping_patience needs training.eval_every_steps",
        ),
        (
            {"training.qat": "int3"},
            r"training.qat must be empty or one of int8, int4, nf4; got 'int3'. Did you mean int8 or int4\?",
        ),
        (
            {"training.qat": "int4", "training.method": "qlora"},
            r"qat=int4 trains float weights .*, but training.method=qlora quantizes them to nf4 from the start",
        ),
        (
            {"training.qat": "int4", "model.quantize": "int8"},
            r"but model.quantize quantizes them to int8 from the start",
        ),
        (
            {"training.qat": "int4", "model.double_quant": True},
            r"training.qat can't be combined with model.double_quant",
        ),
        ({"lora.layout": "pefft"}, r"lora.layout must be one of keras, peft; got 'pefft'. Did you mean peft\?"),
        ({"lora.loraplus_lr_ratio": 0.0}, r"lora.loraplus_lr_ratio must be above 0, got 0.0"),
        (
            {"training.qat": "int4", "lora.use_dora": True},
            r"training.qat rounds .* can't be combined with lora.use_dora",
        ),
        ({"lora.rnk": 3}, r"There is no setting 'lora.rnk'. Did you mean lora.rank"),
        ({"rank": 3}, r"There is no setting 'rank'"),
        ({"lora.rank.x": 3}, r"There is no setting 'lora.rank.x'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config().replace(settings)


def test_a_group_is_no_value():
    with pytest.raises(ConfigError, match="lora is a group of settings, got 3"):
        Config.from_dict({"lora": 3})


def test_python_callers_get_the_same_checks():
    with pytest.raises(ConfigError, match="data.max_length"):
        Config(data=DataConfig(max_length=1))
