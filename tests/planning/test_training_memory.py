"""The memory that training takes by a rule of thumb."""

from gemma_tune.models.sources.preset_catalog import presets
from gemma_tune.planning.training_memory import training_memory


def test_memory_grows_with_what_is_trained():
    for preset in presets():
        needs = training_memory(preset.num_params)
        assert needs.full > needs.lora > needs.qlora > 0
