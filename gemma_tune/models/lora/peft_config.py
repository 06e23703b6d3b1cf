"""Reads PEFT's adapter_config.json, and refuses settings that gemma_tune doesn't support."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import ModelError
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.runtime.json_files import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings that don't change what a trained adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
}  # fmt: skip
_READ = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora"}
# Others, such as pissa, also change the base to which the factors are added.
_INITS_OF_FACTORS_ALONE = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftConfig:
    """The settings of an adapter_config.json.

    Raises:
        ModelError: The file can't be read, or has a type or setting that gemma_tune doesn't support.
    """

    def __init__(self, directory: Path):
        self.file = directory / CONFIG_FILE
        self._values = read_json(self.file)
        if not isinstance(self._values, dict):
            raise ModelError(f"{self.file} is not a JSON object of settings.")
        if self._values.get("peft_type") != "LORA":
            raise ModelError(
                f"{self.file}: peft_type is {self._values.get('peft_type')!r}. gemma_tune reads only PEFT adapters of "
                "type LORA."
            )
        if problem := self._unsupported():
            raise ModelError(f"{self.file}: {problem}, which gemma_tune doesn't support.")
        self._check_values()

    @property
    def base_model(self) -> str:
        """Returns the name or directory of the base model; "" where the file doesn't name it."""
        return str(self._values.get("base_model_name_or_path") or "")

    def lora_spec(self, module: str, rank: int) -> LoraSpec:
        """Returns the spec of a module's factors.

        Args:
            module: Full name of the module, such as `model.layers.0.self_attn.q_proj`.
            rank: Rank of the module's A.

        Raises:
            ModelError: The settings name another rank.
        """
        said = self._of_module("rank_pattern", module, self._values["r"])
        if said != rank:
            raise ModelError(f"{self.file}: {module} should have rank {said}, but its lora_A has rank {rank}.")
        alpha = float(self._of_module("alpha_pattern", module, self._values.get("lora_alpha", 8)))
        return LoraSpec("peft", rank, alpha, bool(self._values.get("use_rslora")), bool(self._values.get("use_dora")))

    def targets(self, module: str) -> bool:
        """Returns whether the settings ask for factors of a module; False where they don't say."""
        wanted, only = self._values.get("target_modules"), self._values.get("layers_to_transform")
        if self._values.get("exclude_modules") or not wanted:
            return False
        index = re.search(r"layers\.(\d+)\.", module)
        if only is not None and (not index or int(index[1]) not in ([only] if isinstance(only, int) else only)):
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _of_module(self, pattern: str, module: str, default: Any) -> Any:
        for key, value in (self._values.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):  # As PEFT matches.
                return value
        return default

    def _unsupported(self) -> str:
        values = self._values
        task, bias, init = values.get("task_type"), values.get("bias"), values.get("init_lora_weights")
        if task not in (None, "CAUSAL_LM"):
            return f"task_type is {task!r}"
        if bias not in (None, "none"):
            return f"bias is {bias!r}"
        if init not in _INITS_OF_FACTORS_ALONE:
            return f"init_lora_weights is {init!r}"
        known = _NEUTRAL | _READ | {"task_type", "bias", "init_lora_weights"}
        for name, value in values.items():
            if name not in known and value not in (None, False, [], {}, ""):
                return f"it sets {name}={value!r:.60}"
        return ""

    def _check_values(self) -> None:
        ranks = [self._values.get("r"), *_values_of(self._values.get("rank_pattern"))]
        alphas = [self._values.get("lora_alpha", 8), *_values_of(self._values.get("alpha_pattern"))]
        right = all(type(rank) is int and rank >= 1 for rank in ranks) and all(
            type(alpha) in (int, float) and 0 < alpha < math.inf for alpha in alphas
        )
        try:
            self.targets("layers.0.a")
            self._of_module("rank_pattern", "a", 0)
            self._of_module("alpha_pattern", "a", 0)
        except (AttributeError, TypeError, re.error) as error:
            raise ModelError(f"{self.file} is damaged: {error}.") from error
        if not right:
            raise ModelError(f"{self.file} is damaged: it has r={ranks!r:.60} and lora_alpha={alphas!r:.60}.")


def _values_of(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, Mapping) else []
