"""gemma_tune: packed rows, low-rank LoRA, no logits.

python -m benchmarks.contenders.ours JOB NUM_EXAMPLES MODEL [key=value …]

MODEL is any that gemma_tune loads, or random:SHAPE:PRECISION.
"""

import time

import jax

from benchmarks.contenders.worker import run, serve
from benchmarks.jobs import Job
from benchmarks.machine import peak_device_bytes
from benchmarks.sources import load_with_job
from gemma_tune.models.functional import parameters
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras
from gemma_tune.training.batches import TrainingBatches
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.per_block import PerBlockProgram, per_block_program
from gemma_tune.training.step.train_step import make_eval_step, make_train_step


def main(job_name: str, num_examples: str, source: str, *settings: str) -> None:
    """Runs passes over a job as the benchmark asks for them."""
    chosen = {
        "targets": "query,value",
        "rank": "4",
        "batch_size": "1",
        "remat": "dots",
        "program": "auto",
        "row_length": "0",
        "attention": "auto",
        "quantize": "",
        "block_size": "64",
        **dict(setting.split("=") for setting in settings),
    }
    quant_spec = QuantSpec(chosen["quantize"], int(chosen["block_size"])) if chosen["quantize"] else None
    model, todo = load_with_job(source, job_name, int(num_examples), quant_spec)
    rank = int(chosen["rank"])
    lora = LoraSettings(rank, float(rank), tuple(chosen["targets"].split(",")), seed=0)
    row_length = int(chosen["row_length"]) or todo.row_length
    program, _ = transform_for_training(
        model,
        lora if chosen["targets"] != "full" else None,
        packing=True,
        remat=chosen["remat"],
        program=chosen["program"],
        attention=chosen["attention"],
        row_length=row_length,
    )
    per_block = per_block_program(program, model, chosen["remat"])
    batches = TrainingBatches(
        todo.examples,
        batch_size=int(chosen["batch_size"]),
        row_length=row_length,
        packing=True,
        seed=0,
        num_epochs=1,
    )
    train(model, batches, todo, per_block)


def train(model: keras.Model, batches: TrainingBatches, todo: Job, per_block: PerBlockProgram | None) -> None:
    """Compiles the step, and serves."""
    groups = parameters(model)
    optimizer = make_optimizer(
        "adamw", make_schedule("constant", 5e-5, 0, 1), weight_decay=0.01, b1=0.9, b2=0.999, epsilon=1e-8, clip_norm=0.0
    )
    evaluate = make_eval_step(model, batches.most_targets, per_block)
    sums = [evaluate(groups.trainable, groups.frozen, batches[index]) for index in range(len(batches))]
    loss = float(sum(s.loss_sum for s in sums) / sum(s.weight_sum for s in sums))
    step = make_train_step(model, optimizer, batches.target_sizes, 1, per_block)
    state = init_state(model, optimizer, take_over=True, guarded=True)
    frozen = groups.frozen
    del groups
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, frozen, batches[0]))
    compile_seconds = time.perf_counter() - start

    def one_pass() -> None:
        nonlocal state
        for index in range(len(batches)):
            state, metrics = step(state, frozen, batches[index])
            float(metrics.loss)  # As the training loop does, so that no step's memory is taken before the last is done.

    serve(
        one_pass,
        peak_device_bytes,
        loss=loss,
        num_tokens=todo.num_tokens,
        num_targets=todo.num_targets,
        num_steps=len(batches),
        num_positions=len(batches) * batches.batch_size * batches.row_length,
        first_step_seconds=compile_seconds,
    )


if __name__ == "__main__":
    run(main)
