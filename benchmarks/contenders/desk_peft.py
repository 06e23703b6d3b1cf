"""transformers and peft on torch: the quickstart's data, rank, layers, learning rate, batches and order of examples.

    python -m benchmarks.contenders.desk_peft SEED PRECISION

Each batch has the examples of our packed rows, padded to the longest. LoRA's factors are drawn by peft, and are float32
beside bfloat16 weights, as peft makes them.
"""

import time
from collections.abc import Sequence

import peft
import torch

from benchmarks.contenders.desk import MAX_NEW_TOKENS, all_questions, config
from benchmarks.contenders.peft_torch import load_weights, padded_batch
from benchmarks.contenders.worker import run, tell
from gemma_tune.config import Config
from gemma_tune.data import TokenizedExample, template_for, tokenize_splits
from gemma_tune.models.sources.download import demo_path
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.pipeline import read_splits
from gemma_tune.pipeline.program import schedule_of
from gemma_tune.pipeline.setup import make_training_batches
from gemma_tune.serving.prompt_encoder import PromptEncoder

_QUESTIONS_AT_ONCE = 8


def main(seed: str, precision: str) -> None:
    """Trains once and answers all questions."""
    settings = config(int(seed), precision, "")
    torch.manual_seed(int(seed))
    model, checkpoint = load_weights(demo_path())
    tokenizer, template = TextTokenizer(checkpoint.tokenizer_proto()), template_for("gemma3")
    length, overlong = settings.data.max_length, settings.data.overlong
    data = tokenize_splits(read_splits(settings), template, tokenizer, length, overlong)
    batches = make_training_batches(settings, data, 1)
    rank, alpha = settings.lora.rank, settings.lora_alpha
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.to(getattr(torch, precision)), lora)
    start = time.perf_counter()
    steps = [[data.train[i] for i in batches.example_indices(step)] for step in range(len(batches))]
    train(model, settings, steps)
    seconds = time.perf_counter() - start
    answers = answer(model, PromptEncoder(tokenizer, template))
    tell(answers=answers, seconds=seconds, num_steps=len(steps))


def train(model: torch.nn.Module, settings: Config, steps: Sequence[Sequence[TokenizedExample]]) -> None:
    """Trains the factors, with one update for the examples of each step."""
    chosen = settings.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=1.0,
        betas=(chosen.b1, chosen.b2),
        eps=chosen.epsilon,
        weight_decay=chosen.weight_decay,
    )
    schedule = schedule_of(settings, len(steps))
    model.train()
    for step, examples in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        loss = model(**padded_batch(examples)).loss
        loss.backward()
        if chosen.clip_norm:  # 0 is no limit to us, and to torch a limit of 0.
            torch.nn.utils.clip_grad_norm_(parameters, chosen.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def answer(model: torch.nn.Module, encoder: PromptEncoder) -> list[str]:
    """Returns the answers to all questions by greedy decoding, several at once, padded on the left."""
    model.eval()
    prompts = [encoder.encode(case.prompt) for case in all_questions()]
    answers: list[str] = []
    for start in range(0, len(prompts), _QUESTIONS_AT_ONCE):
        chosen = prompts[start : start + _QUESTIONS_AT_ONCE]
        length = max(map(len, chosen))
        ids, mask = torch.zeros((2, len(chosen), length), dtype=torch.long)
        for row, prompt in enumerate(chosen):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        with torch.no_grad():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(encoder.stop_ids),
                pad_token_id=encoder.stop_ids[-1],
            )
        for row in made[:, length:].tolist():
            stop = min((row.index(token) for token in encoder.stop_ids if token in row), default=len(row))
            answers.append(encoder.tokenizer.decode(row[:stop]).strip())
    return answers


if __name__ == "__main__":
    run(main)
