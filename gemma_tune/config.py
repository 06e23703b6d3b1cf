"""All settings of a run, as one tree of frozen dataclasses.

`Config()` is a complete, valid run. A setting is named by its path in the tree, such as `lora.rank`: in flags
(`--config.lora.rank=8`), in error messages and in a run's `config.json`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_tune.config_checks import check_values
from gemma_tune.config_groups import (
    DataConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.saved_settings import RELATIVE_TO, with_current_values
from gemma_tune.settings import check_types, from_plain, setting_paths, to_plain

__all__ = [
    "Config",
    "DataConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        workdir: Folder of the run, which holds everything that it writes. The same command on the same workdir resumes
            the run.
        seed: Random seed of tiny models' weights, LoRA factors, the data's split and order, and sampling.
        model: Which model, and in which number format.
        data: Training data, and how it becomes batches.
        lora: LoRA factors.
        optimizer: Update rule and learning rate.
        training: How training runs.
        generation: How answers are generated.
    """

    workdir: str = "runs/gemma_tune"
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)

    def __post_init__(self):
        check_types(self, "")
        check_values(self)

    @property
    def learning_rate(self) -> float:
        """Returns the peak learning rate, or the method's default where none is set."""
        if self.optimizer.learning_rate:
            return self.optimizer.learning_rate
        return 5e-5 if self.training.method == "full" else 5e-4

    @property
    def quant_spec(self) -> QuantSpec | None:
        """Returns how the base weights are quantized, with the method's default; None: not at all."""
        scheme = self.model.quantize or ("nf4" if self.training.method == "qlora" else "")
        model = self.model
        return QuantSpec(scheme, model.block_size, model.double_quant, model.or_int8) if scheme else None

    @property
    def qat_spec(self) -> QuantSpec | None:
        """Returns how quantization-aware training rounds weights; None without it."""
        model = self.model
        return QuantSpec(self.training.qat, model.block_size, or_int8=model.or_int8) if self.training.qat else None

    @property
    def row_length(self) -> int:
        """Returns the length of a packed row, in tokens."""
        return self.data.row_length or self.data.max_length

    @property
    def lora_alpha(self) -> float:
        """Returns LoRA's alpha, or the rank where none is set."""
        return self.lora.alpha or float(self.lora.rank)

    @property
    def lora_settings(self) -> dict[str, Any]:
        """Returns the arguments from which LoRA factors are made."""
        lora = self.lora
        return {
            "rank": lora.rank,
            "alpha": self.lora_alpha,
            "target_layers": lora.target_layers,
            "seed": self.seed,
            "layout": lora.layout,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
        }

    @property
    def optimizer_numbers(self) -> dict[str, Any]:
        """Returns the numbers of the optimizer, without its learning-rate schedule."""
        optimizer = self.optimizer
        names = ("weight_decay", "b1", "b2", "epsilon", "clip_norm")
        return {name: getattr(optimizer, name) for name in names} | {"loraplus_lr_ratio": self.lora.loraplus_lr_ratio}

    def replace(self, settings: Mapping[str, Any]) -> "Config":
        """Returns a copy with some settings changed: `config.replace({"lora.rank": 8})`.

        Raises:
            ConfigError: There is no such setting (suggests the nearest), or a value is not allowed.
        """
        tree = self.to_dict()
        for path, value in settings.items():
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node[parent] if isinstance(node.get(parent), dict) else {}
            if leaf not in node:
                raise ConfigError(f"There is no setting {path!r}.{did_you_mean(path, setting_paths(Config))}")
            node[leaf] = value
        return Config.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of plain values; tuples become lists, as in JSON."""
        return to_plain(self)

    @staticmethod
    def from_saved(tree: Mapping[str, Any]) -> "Config":
        """Builds a Config from a run's `config.json`, whichever version wrote it. Raises what `from_dict` does."""
        return Config.from_dict(with_current_values(tree) if isinstance(tree, Mapping) else tree)

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "Config":
        """Builds a Config from nested dicts, with defaults for missing settings.

        Paths stay as they are: `workdir_config.read_workdir_config` finds those of a run from another folder.

        Raises:
            ConfigError: A setting is unknown (suggests the nearest), or a value is not allowed.
        """
        if isinstance(tree, Mapping):
            tree = {name: value for name, value in tree.items() if name != RELATIVE_TO}
        return from_plain(Config, tree)
