"""Two hundred steps of ours, packed and without logits, follow the loss curve of the Keras tutorial's way."""

import numpy as np
import pytest

from gemma_tune.data import load_examples, make_batch, plan_rows, template_for
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.models.functional import parameters, variables_by_path
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.per_block import per_block_program
from gemma_tune.training.step.train_step import make_train_step

NUM_STEPS, NUM_EXAMPLES, EXAMPLES_A_STEP, LENGTH = 200, 32, 4, 48
NUM_ROWS, ROW_LENGTH = 2, 112
LEARNING_RATE, WEIGHT_DECAY, B1, B2, EPSILON = 3e-3, 0.01, 0.9, 0.999, 1e-8
RANK, TARGETS = 4, ("query", "value")
# The first losses differ by float32's roundings, 1e-6. AdamW divides by roots of squares, so it carries roundings of
# small gradients on; over 200 steps they grow to 4e-4 on losses of 6. The negative control is off by 4e-2.
TOLERANCE = 4e-3


@pytest.fixture(scope="module")
def steps(tiny_tokenizer):
    """The examples of each step, in the order in which both ways see them."""
    examples = load_examples("sample:smartphone_support")[:330][:: 330 // NUM_EXAMPLES][:NUM_EXAMPLES]
    tokens = tokenize_examples(examples, template_for("gemma3"), tiny_tokenizer, LENGTH, "truncate").examples
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(tokens)) for _ in range(-(-NUM_STEPS * EXAMPLES_A_STEP // len(tokens)))]
    order = np.concatenate(epochs)[: NUM_STEPS * EXAMPLES_A_STEP].reshape(NUM_STEPS, EXAMPLES_A_STEP)
    return [[tokens[i] for i in each] for each in order]


def our_curve(model, steps):
    """Packed rows, gemma_tune's step; returns the loss of each step and LoRA's values before the first."""
    lora = LoraSettings(RANK, float(RANK), TARGETS, seed=0)
    program = transform_for_training(model, lora, packing=True, remat="dots", row_length=ROW_LENGTH).program
    schedule = make_schedule("constant", LEARNING_RATE, 0, NUM_STEPS)
    optimizer = make_optimizer(
        "adamw", schedule, weight_decay=WEIGHT_DECAY, b1=B1, b2=B2, epsilon=EPSILON, clip_norm=0.0
    )
    groups = parameters(model)
    before = {path: np.array(value) for path, value in groups.trainable.items()}
    per_block = per_block_program(program, model, "dots")
    step = make_train_step(model, optimizer, NUM_ROWS * ROW_LENGTH, 1, per_block)
    state, losses = init_state(model, optimizer), []
    for examples in steps:
        lengths = np.array([len(example.token_ids) - 1 for example in examples])
        rows = plan_rows(lengths, ROW_LENGTH, True)
        assert len(rows) <= NUM_ROWS < len(examples)  # They are packed.
        batch = make_batch([[examples[i] for i in row] for row in rows], NUM_ROWS, ROW_LENGTH)
        state, metrics = step(state, groups.frozen, batch)
        losses.append(float(metrics.loss))
    return np.array(losses), before


class Tutorial:
    """from_preset, enable_lora, compile; then a step at a time of what `fit` does. Each example is padded to LENGTH."""

    def __init__(self, model, lora_values):
        model.backbone.enable_lora(RANK, target_layer_names=list(TARGETS))
        self.model = keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=model.backbone)
        self.lora_values = lora_values
        self.model.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer=keras.optimizers.AdamW(
                LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta_1=B1, beta_2=B2, epsilon=EPSILON
            ),
        )
        self.model.optimizer.build(self.model.trainable_variables)

    def curve(self, steps, mean_of_targets=True):
        """Returns the mean loss of each step's targets; `mean_of_targets=False` divides by all positions, as Keras does
        when it isn't told otherwise.
        """
        variables = variables_by_path(self.model)
        for path, value in self.lora_values.items():
            variables[path].assign(value)
        for variable in self.model.optimizer.variables:
            if variable is not self.model.optimizer._learning_rate:
                variable.assign(np.zeros(variable.shape))
        losses = []
        for examples in steps:
            inputs, targets, weights = padded(examples)
            share = weights.sum() / weights.size
            weights = weights / share if mean_of_targets else weights
            loss = float(self.model.train_on_batch(inputs, targets, weights, return_dict=True)["loss"])
            losses.append(loss if mean_of_targets else loss / share)
        return np.array(losses)


def padded(examples):
    ids, targets = np.zeros((2, len(examples), LENGTH), np.int32)
    mask, weights = np.zeros((len(examples), LENGTH), bool), np.zeros((len(examples), LENGTH), np.float32)
    for row, example in enumerate(examples):
        n = len(example.token_ids) - 1
        ids[row, :n], targets[row, :n] = example.token_ids[:-1], example.token_ids[1:]
        mask[row, :n], weights[row, :n] = True, example.is_target[1:]
    return {"token_ids": ids, "padding_mask": mask}, targets, weights


@pytest.mark.nightly
def test_ours_follows_the_tutorials_loss_curve(tiny, steps):
    ours, lora_values = our_curve(tiny("gemma3"), steps)
    tutorial = Tutorial(tiny("gemma3"), lora_values)
    theirs = tutorial.curve(steps)
    assert ours[-10:].mean() < ours[:10].mean() - 1.0  # There is something to follow.
    np.testing.assert_allclose(ours[:10], theirs[:10], atol=1e-4)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    # Negative control: with each step's gradient divided by all positions, padding included, AdamW weighs steps of
    # unequal token counts unequally, and the curve is another one.
    assert np.abs(tutorial.curve(steps, mean_of_targets=False) - theirs).max() > 3 * TOLERANCE
