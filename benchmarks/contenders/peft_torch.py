"""transformers and peft on torch, each batch padded to its longest example; on the GPU where torch has one.

python -m benchmarks.contenders.peft_torch JOB NUM_EXAMPLES GGUF_FILE|random:SHAPE:PRECISION [key=value …]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.contenders.worker import run, serve, tell_loaded
from benchmarks.jobs import Job, job
from benchmarks.shapes import Shape, parse_random, random_job
from gemma_tune.data import TokenizedExample
from gemma_tune.runtime.process_memory import peak_memory_bytes

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(source: str, job_name: str, num_examples: int) -> tuple[torch.nn.Module, Job]:
    """Returns the model, with random weights or those of a file, and its job."""
    random = parse_random(source)
    if random:
        model = random_model(*random)
        tell_loaded(sum(parameter.nbytes for parameter in model.parameters()))
        return model, random_job(num_examples, random[0].vocabulary)
    from gemma_tune.models.sources.tokenizer import TextTokenizer

    model, checkpoint = load_weights(Path(source))
    tell_loaded(sum(parameter.nbytes for parameter in model.parameters()))
    return model, job(job_name, num_examples, TextTokenizer(checkpoint.tokenizer_proto()))


def load_weights(path: Path) -> tuple[torch.nn.Module, Any]:
    """Fills transformers' model tensor by tensor; tests/golden shows that these are what its own GGUF reader gives.

    Args:
        path: A GGUF file.

    Returns:
        The model in float32, and our reader of the file.
    """
    from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**checkpoint.config)).to(_DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(checkpoint.rows(name, 0, checkpoint.num_rows(name)).copy()))
    return model, checkpoint


def random_model(shape: Shape, precision: str) -> torch.nn.Module:
    """Builds a model with transformers' own random weights on the device."""
    config_cls, model_cls = {
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[shape.family]
    config = config_cls(
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        head_dim=shape.head_width,
        query_pre_attn_scalar=shape.head_width,
        sliding_window=shape.window,
    )
    torch.set_default_dtype(getattr(torch, precision))
    try:
        with _DEVICE:
            return model_cls(config)
    finally:
        torch.set_default_dtype(torch.float32)


def padded_batches(todo: Job, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Returns all examples in batches, each as long as its longest example."""
    starts = range(0, len(todo.examples), batch_size)
    return [padded_batch(todo.examples[start : start + batch_size]) for start in starts]


def padded_batch(examples: Sequence[TokenizedExample]) -> dict[str, torch.Tensor]:
    """Returns examples as one batch, as long as its longest example."""
    length = max(len(example.token_ids) for example in examples)
    ids = torch.zeros((len(examples), length), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = len(example.token_ids)
        ids[row, :n], mask[row, :n] = torch.from_numpy(example.token_ids).long(), 1
        labels[row, :n] = torch.where(torch.from_numpy(example.is_target), ids[row, :n], -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(_DEVICE) for name, tensor in batch.items()}


def mean_loss(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Returns the mean loss of all target tokens."""
    with torch.no_grad():
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        losses = [float(model(**batch).loss) for batch in batches]
    return sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)


def main(job_name: str, num_examples: str, source: str, *settings: str) -> None:
    """Runs passes over a job as the benchmark asks for them."""
    chosen: dict[str, Any] = {"targets": "q_proj,v_proj", "rank": 4, **dict(setting.split("=") for setting in settings)}
    model, todo = load(source, job_name, int(num_examples))
    if chosen["targets"] != "full":
        import peft

        rank = int(chosen["rank"])
        targets = chosen["targets"] if chosen["targets"] == "all-linear" else chosen["targets"].split(",")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.01)
    batches = padded_batches(todo, int(chosen.get("batch_size", todo.peer_batch_size)))

    def step(batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    loss = mean_loss(model, batches)
    step(batches[0])

    def one_pass() -> None:
        for batch in batches:
            step(batch)
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    serve(
        one_pass, torch.cuda.max_memory_allocated if _DEVICE.type == "cuda" else peak_memory_bytes,
        loss=loss, num_tokens=todo.num_tokens, num_targets=todo.num_targets, num_steps=len(batches),
        num_positions=sum(batch["input_ids"].numel() for batch in batches),
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
