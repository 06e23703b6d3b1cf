"""transformers and peft on torch, each batch padded to its longest example.

python -m benchmarks.contenders.peft_torch JOB NUM_EXAMPLES GGUF_FILE [key=value …]
"""

import sys
from pathlib import Path

import torch
import transformers

from benchmarks.contenders.worker import serve, tell_loaded
from benchmarks.jobs import job
from gemma_tune.models.gguf_checkpoint import GgufCheckpoint
from gemma_tune.models.tokenizer import TextTokenizer


def load(path: str) -> tuple[torch.nn.Module, TextTokenizer]:
    """Fills transformers' model tensor by tensor; tests/golden shows that these are what its own GGUF reader gives."""
    checkpoint = GgufCheckpoint(Path(path))
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**checkpoint.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(checkpoint.rows(name, 0, checkpoint.num_rows(name)).copy()))
    return model, TextTokenizer(checkpoint.tokenizer_proto())


def main(job_name: str, num_examples: str, path: str, *settings: str) -> None:
    """Runs passes over a job as the benchmark asks for them."""
    chosen = {"targets": "q_proj,v_proj", **dict(setting.split("=") for setting in settings)}
    model, tokenizer = load(path)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    tell_loaded(weight_bytes)
    todo = job(job_name, int(num_examples), tokenizer)
    batch_size = int(chosen.get("batch_size", todo.peer_batch_size))
    if chosen["targets"] != "full":
        import peft

        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=chosen["targets"].split(","), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.01)
    batches = []
    for start in range(0, len(todo.examples), batch_size):
        examples = todo.examples[start : start + batch_size]
        length = max(len(example.token_ids) for example in examples)
        ids = torch.zeros((len(examples), length), dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example.token_ids)
            ids[row, :n], mask[row, :n] = torch.from_numpy(example.token_ids).long(), 1
            labels[row, :n] = torch.where(torch.from_numpy(example.is_target), ids[row, :n], -100)
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})

    def step(batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        losses = [float(model(**batch).loss) for batch in batches]
    loss = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    step(batches[0])

    def one_pass() -> None:
        for batch in batches:
            step(batch)

    serve(
        one_pass, loss=loss, num_tokens=todo.num_tokens, num_targets=todo.num_targets, num_steps=len(batches),
        num_positions=sum(batch["input_ids"].numel() for batch in batches),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
