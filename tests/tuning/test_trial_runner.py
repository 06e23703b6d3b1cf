"""Trials in one process: equal to runs of `train`, on one base model, without compiling what is there already."""

import contextlib

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_tune import Config, pipeline
from gemma_tune.errors import ConfigError
from gemma_tune.models.functional import parameters
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.tuning.runner.shared_programs import NUMBERS, program_config, rounded_sizes
from gemma_tune.tuning.runner.side_by_side import num_side_by_side
from gemma_tune.tuning.runner.trial_runner import TrialRunner
from gemma_tune.tuning.runner.trial_state import TrialState, load_state, save_state

CONFIG = Config().replace({
    "model.source": "tiny", "data.max_length": 48, "data.source": "sample:smartphone_support",
    "training.batch_size": 4, "training.num_train_steps": 6, "training.eval_every_steps": 2,
    "training.checkpoint_every_steps": 3, "training.num_sample_answers": 0, "training.num_scored_answers": 0,
    "optimizer.learning_rate": 5e-3,
})  # fmt: skip
OTHER_NUMBERS = {
    "optimizer.learning_rate": 2e-2, "optimizer.schedule": "linear", "optimizer.warmup_steps": 3,
    "optimizer.weight_decay": 0.2, "optimizer.b1": 0.8, "optimizer.b2": 0.99, "optimizer.epsilon": 1e-6,
    "optimizer.clip_norm": 0.1, "lora.alpha": 6.0, "lora.loraplus_lr_ratio": 3.0, "training.num_train_steps": 5,
}  # fmt: skip
NOTHING_CLIPPED_OR_DECAYED = {"optimizer.clip_norm": 0.0, "optimizer.weight_decay": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def runner():
    runner = TrialRunner(CONFIG)
    runner.run(CONFIG)
    return runner


@contextlib.contextmanager
def compilations():
    """Yields a list that gets an entry for each program that XLA compiles, or loads from its cache, meanwhile."""
    found, is_over = [], []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration" and not is_over:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    is_over.append(True)


@pytest.mark.parametrize(
    "settings",
    [
        OTHER_NUMBERS,
        pytest.param(NOTHING_CLIPPED_OR_DECAYED, marks=pytest.mark.nightly),
        pytest.param({"lora.use_dora": True, "lora.alpha": 6.0}, marks=pytest.mark.nightly),
        pytest.param({"training.program": "whole", "lora.alpha": 6.0}, marks=pytest.mark.nightly),
        pytest.param({"training.method": "full", "optimizer.name": "lion"}, marks=pytest.mark.nightly),
        pytest.param({"training.grad_accum_steps": 2, "optimizer.name": "adafactor"}, marks=pytest.mark.nightly),
        pytest.param({"lora.dropout": 0.3, "training.grad_accum_steps": 2, "seed": 0}, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_a_trial_is_a_run_of_train(runner, tmp_path, settings):
    """Bit for bit, though the run's step was compiled for its own number of targets, and with alpha as a constant."""
    config = CONFIG.replace(settings)
    seen = {}
    result = runner.run(config, lambda step, metrics: seen.update({step: metrics["loss"]}))
    run = pipeline.run_training(config.replace({"workdir": str(tmp_path / "run")}))
    assert (result.best_step, result.metrics) == (run.best_step, run.after)
    assert result.num_steps == run.num_steps and min(seen.values()) == run.after["loss"] < seen[0]
    if config.training.method != "full":
        assert runner.save_last_adapter(tmp_path / "trial").read_bytes() == run.saved_to.read_bytes()


@pytest.mark.slow
def test_trials_side_by_side_are_separate_ones(runner):
    """Equal but for the order of float32 sums in products of more rows; one ends early, and one is pruned."""

    class Pruned(Exception):
        pass

    def prune(step, metrics):
        if step == 4:
            raise Pruned

    configs = [CONFIG.replace(each) for each in ({}, OTHER_NUMBERS | {"seed": 3}, {"optimizer.learning_rate": 1e-3})]
    seen = [{} for _ in configs]
    listeners = [lambda step, metrics, found=found: found.update({step: metrics["loss"]}) for found in seen]
    results = runner.run_together(configs, [*listeners[:2], prune])
    assert isinstance(results[2], Pruned)
    for config, found, result in zip(configs[:2], seen, results, strict=False):
        separate = {}
        wanted = runner.run(config, lambda step, metrics, separate=separate: separate.update({step: metrics["loss"]}))
        assert found.keys() == separate.keys() and result.num_steps == wanted.num_steps
        np.testing.assert_allclose(list(found.values()), list(separate.values()), rtol=1e-5)
        assert result.best_step == wanted.best_step
    assert abs(seen[0][4] - seen[1][4]) > 1e-3  # Negative control: they are different trials.
    again = runner.run_together(configs, listeners[:1] * 3)
    assert {result.num_compilations for result in again} == {0}
    with pytest.raises(ConfigError, match="must differ only in settings that are inputs"):
        runner.run_together([CONFIG, CONFIG.replace({"lora.rank": 2})], listeners[:2])


def test_how_many_fit_side_by_side():
    assert [num_side_by_side(limit, 10.0, 12.0) for limit in (5.0, 13.0, 14.0, 20.9)] == [1, 1, 2, 5]


@pytest.mark.slow
def test_trials_that_differ_in_numbers_compile_nothing(runner):
    with compilations() as first:
        assert runner.run(CONFIG).num_compilations == 0
    changed = runner.run(CONFIG.replace(OTHER_NUMBERS | {"seed": 7}))  # Programs of more or fewer batches, if any.
    with compilations() as found:
        again = runner.run(CONFIG.replace(OTHER_NUMBERS | {"seed": 7, "optimizer.learning_rate": 1e-3}))
        clipped = runner.run(CONFIG.replace(NOTHING_CLIPPED_OR_DECAYED))
    assert (len(first), len(found), changed.num_compilations, again.num_compilations) == (0, 0, 0, 0)
    assert len({changed.metrics["loss"], again.metrics["loss"], clipped.metrics["loss"]}) == 3
    with compilations() as found:  # Negative control.
        assert runner.run(CONFIG.replace({"lora.rank": 2})).num_compilations == 1
    assert found


@pytest.mark.slow
def test_a_pruned_trial_leaves_no_trace(runner):
    class Pruned(Exception):
        pass

    def prune(step, metrics):
        if step == 2:
            raise Pruned

    wanted = runner.run(CONFIG)
    with pytest.raises(Pruned):
        runner.run(CONFIG.replace(OTHER_NUMBERS), prune)
    assert runner.run(CONFIG).metrics == wanted.metrics


@pytest.mark.slow
def test_a_trial_goes_on_from_its_state(runner, tmp_path):
    config, states = CONFIG.replace(OTHER_NUMBERS | {"training.num_train_steps": 6}), {}
    whole = runner.run(config, on_checkpoint=lambda state: states.update({int(state.arrays[".step"]): state}))
    wanted = runner.save_last_adapter(tmp_path / "whole").read_bytes()
    runner.run(CONFIG)  # Another trial in between.
    steps = []
    resumed = runner.run(config, lambda step, metrics: steps.append(step), start=states[3])
    assert steps == [4, 6] and resumed.num_steps == 6
    assert (resumed.metrics, resumed.best_step) == (whole.metrics, whole.best_step)
    assert runner.save_last_adapter(tmp_path / "resumed").read_bytes() == wanted


@pytest.mark.slow
def test_all_programs_share_the_frozen_arrays_of_one_base(runner):
    base = parameters(runner._programs._load_base(CONFIG))
    held = {id(array) for array in (*base.frozen.values(), *base.trainable.values())}
    for settings in ({}, {"lora.rank": 2}, {"lora.target_layers": ("ffw_gating",), "lora.layout": "peft"}):
        frozen = runner._programs.set_up(CONFIG.replace(settings)).frozen
        large = [array for array in frozen.values() if array.ndim]  # LoRA's scale has no axes.
        assert large and all(id(array) in held for array in large)


@pytest.mark.slow
def test_the_trials_seed_draws_factors_and_order_and_the_searchs_splits(runner):
    setups = [runner._programs.set_up(CONFIG.replace({"seed": seed})) for seed in (0, 5)]
    first, second = (setup.state.trainable for setup in setups)
    assert all(np.any(first[path] != second[path]) for path in first if path.endswith("_a"))
    assert np.any(setups[0].batches[0].token_ids != setups[1].batches[0].token_ids)
    assert setups[0].data is setups[1].data


@pytest.mark.slow
def test_other_data_is_refused(runner):
    with pytest.raises(ConfigError, match="the same data.*data.eval_fraction is 0.1, got 0.2"):
        runner.run(CONFIG.replace({"data.eval_fraction": 0.2}))


def test_numbers_are_no_part_of_a_programs_settings():
    wanted = program_config(CONFIG)
    for path in NUMBERS:
        settings = OTHER_NUMBERS | NOTHING_CLIPPED_OR_DECAYED | {"workdir": "elsewhere", "training.num_epochs": 9}
        assert program_config(CONFIG.replace({path: settings[path]} if path in settings else {})) == wanted
    for other in ({"lora.rank": 2}, {"data.max_length": 64}, {"optimizer.name": "lion"}, {"training.method": "full"}):
        assert program_config(CONFIG.replace(other)) != wanted
    # Alpha is a constant where the embedding has factors.
    on_embedding = CONFIG.replace({"lora.target_layers": ("token_embedding",)})
    assert program_config(on_embedding) != program_config(on_embedding.replace({"lora.alpha": 9.0}))


def test_sizes_have_room_for_other_seeds():
    assert rounded_sizes((90, 101, 130), 512) == (96, 128, 160)
    assert rounded_sizes((500, 505, 510), 512) == (512,)
    assert rounded_sizes((1,), 4) == (2,)


def test_a_state_in_a_file_is_the_same(tmp_path):
    arrays = {".step": np.int32(3), "a/b": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "k": np.uint32([1, 2])}
    state = TrialState(arrays, Progress(0.5, 2, 1), {"w": np.float32([[0.1]])}, {"loss": 0.5})
    save_state(tmp_path / "trials/0/state.npz", state)
    found = load_state(tmp_path / "trials/0/state.npz")
    assert found.step == 3 and (found.progress, found.metrics) == (state.progress, state.metrics)
    for kept, wanted in ((found.arrays, arrays), (found.best, state.best)):
        assert kept.keys() == wanted.keys()
        for path, array in wanted.items():
            assert kept[path].dtype == array.dtype
            np.testing.assert_array_equal(kept[path], array)
    content = (tmp_path / "trials/0/state.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    assert load_state(tmp_path / "half.npz") is None and load_state(tmp_path / "none.npz") is None
