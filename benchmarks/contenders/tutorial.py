"""The way of the Keras tutorial on fine-tuning Gemma with LoRA: from_preset, enable_lora(4), fit at a fixed length.

    python -m benchmarks.contenders.tutorial JOB NUM_EXAMPLES PRESET_DIRECTORY|random:SHAPE:PRECISION [key=value …]

The token ids are made beforehand and are the same as everybody's, so that the tutorial's own preprocessing takes no
time.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np

from benchmarks.contenders.worker import run, serve, tell_loaded
from benchmarks.jobs import Job, job
from benchmarks.machine import peak_device_bytes
from benchmarks.shapes import parse_random
from benchmarks.sources import load_with_job


def load(source: str, job_name: str, num_examples: int) -> tuple[keras.Model, Job]:
    """Loads a preset as the tutorial does; random weights as all do."""
    if parse_random(source):
        return load_with_job(source, job_name, num_examples)
    from gemma_tune.models.load import load_tokenizer

    model = keras_hub.models.Gemma3CausalLM.from_preset(source, dtype="float32", preprocessor=None)
    tell_loaded(sum(v.value.nbytes for v in model.backbone.variables))
    return model, job(job_name, num_examples, load_tokenizer(source)[0])


def main(job_name: str, num_examples: str, source: str, *settings: str) -> None:
    """Runs passes over a job as the benchmark asks for them."""
    chosen = {"targets": "query,value", "batch_size": "1", **dict(setting.split("=") for setting in settings)}
    model, todo = load(source, job_name, int(num_examples))
    if chosen["targets"] != "full":
        model.backbone.enable_lora(4)
    count, length = len(todo.examples), todo.fixed_length
    ids, targets = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    mask, weights = np.zeros((count, length), bool), np.zeros((count, length), np.float32)
    for row, example in enumerate(todo.examples):
        n = min(len(example.token_ids) - 1, length)
        ids[row, :n], targets[row, :n] = example.token_ids[:n], example.token_ids[1 : n + 1]
        mask[row, :n], weights[row, :n] = True, example.is_target[1 : n + 1]
    inputs = {"token_ids": ids, "padding_mask": mask}
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.AdamW(learning_rate=5e-5, weight_decay=0.01),
    )
    arguments = {"batch_size": int(chosen["batch_size"]), "verbose": 0}
    # Keras divides by all positions; we want the mean over those that count.
    mean = model.evaluate(inputs, targets, sample_weight=weights, return_dict=True, **arguments)["loss"]
    loss = mean * weights.size / weights.sum()

    def one_pass() -> None:
        model.fit(inputs, targets, sample_weight=weights, epochs=1, shuffle=False, **arguments)

    one = slice(0, arguments["batch_size"])
    model.fit({k: v[one] for k, v in inputs.items()}, targets[one], sample_weight=weights[one], **arguments)
    serve(
        one_pass, peak_device_bytes, loss=float(loss), num_tokens=todo.num_tokens, num_targets=todo.num_targets,
        num_steps=-(-count // arguments["batch_size"]), num_positions=weights.size,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
