"""The groups of settings that a Config consists of, with every default.

This is the only place where a default stands. config_checks.py says which values are allowed.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and in which number format its weights are.

    Attributes:
        source: A preset, `kaggle://…`, `hf://…`, a directory, a `.gguf` file, `demo`, `tiny` or `tiny:FAMILY`, or the
            workdir of an earlier run (its base model with its adapter).
        precision: Number format: `float32`; `bfloat16` or `float16` (weights and arithmetic); `mixed_bfloat16` or
            `mixed_float16` (float32 weights, 16-bit arithmetic). Training in float16 scales the loss.
            models/precision.py says what stays float32.
        quantize: Scheme to quantize the weights of linear layers and embedding with: `int8`, `int4` or `nf4` (QLoRA,
            arXiv:2305.14314). Empty: `nf4` with training.method=qlora, otherwise none.
        block_size: Number of int4 or nf4 weights that share a scale: 32, 64, 128 or 256.
        double_quant: Whether these scales are quantized too, to eight bits.
        or_int8: Whether layers whose input width is no multiple of `block_size` are quantized to int8 instead.
        adapter: File or folder of LoRA factors to continue training, of an earlier run or from PEFT. Their rank, alpha,
            layers and layout stay as they are.
    """

    source: str = "demo"
    precision: str = "float32"
    quantize: str = ""
    block_size: int = 64
    double_quant: bool = False
    or_int8: bool = False
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how it becomes batches.

    Attributes:
        source: Files or folders (globs and comma-separated lists allowed), a data set on the Hugging Face Hub
            (`hf://datasets/ORG/NAME[:config][@split]` or `ORG/NAME`), `tfds:name/config`, or `sample:NAME`. Several
            with weights are a mixture: `a.jsonl:0.7,b.parquet:0.3` gives their shares of the examples of an epoch,
            `a.jsonl:1x,b.jsonl:3x` how often each example occurs in an epoch. data/mixture.py says how they are drawn.
        eval_source: Source of the held-out data, written like `source`. Empty: the held-out set of the sample that
            `source` names if it has one, otherwise `eval_fraction` of `source`.
        split: Split to read of a data set that has several: of TFDS, of the Hub, or in a folder or JSON file.
        eval_split: Split of the same data set to hold out. Empty: `eval_fraction` of `split` is held out.
        eval_fraction: Share of the questions to hold out, chosen by a hash of their content; 0: none.
        system_prompt: System turn to put before every conversation that has none.
        max_length: Maximum length of an example, in tokens.
        row_length: Length of a packed row, in tokens; 0: `max_length`. Longer rows are filled better, above all when
            many examples are nearly as long as max_length, and take more memory in proportion.
        overlong: Treatment of longer examples: `chunk` (a document is cut into pieces that together hold each of its
            tokens once; a conversation, which can't be cut up, is truncated), `truncate`, `drop` or `error`. What is
            cut off or dropped is counted, in examples and in tokens.
        on_error: Treatment of unreadable rows: `raise`, or `skip` (counted and reported).
        columns: What columns with unusual names are: `prompt:User Question,completion:Bot Answer`. A column may be
            `messages`, `instruction`, `prompt`, `completion`, `input`, `context`, `system`, `tools`, `thought`, `label`
            or `text`; `label:` with nothing after it means that no column is one.
        prompt_template: Template of the question, with columns in braces: `{title}\\n{body}`. Empty: the question is
            the column that says so, with `context` and `input` beside it.
        on_role_order: What happens to conversations in which user and model don't take turns: `merge` (neighbours are
            joined, later system turns become the user's, a leading model turn is context; each counted) or `error`.
        thoughts: What happens to the thoughts before an answer: `keep` (they are learnt, where the chat template has a
            place for them), `mask` (they are read but not learnt) or `drop`; each counted.
        packing: Whether several examples may share a row, kept apart by the attention mask.
        dedup: What is dropped as a duplicate: examples all of whose turns are equal but for case, spaces and the
            punctuation at their end (`normalized`), equal in every character (`exact`), or nothing (`none`).
        near_dedup_threshold: Similarity from which an example is dropped as a near duplicate of an earlier one, above 0
            and at most 1: the share of runs of three words that both have (MinHash). 0.8 is usual. Needs the extra
            `dedup`. 0: near duplicates are kept.
        mixture_temperature: Temperature T of a mixture: the rates of its sources are proportional to weight^(1/T),
            without weights to size^(1/T). 1: as they are; higher: more equal.
        mixture_max_repeats: Limit of how often an example of a mixture occurs in an epoch on average; 0: none. With few
            data, up to four repeats are nearly as good as new data (arXiv:2305.16264).
        mixture_max_examples: Limit of the examples that an epoch takes from each source of a mixture; 0: none.
    """

    source: str = "sample:smartphone_support"
    eval_source: str = ""
    split: str = "train"
    eval_split: str = ""
    eval_fraction: float = 0.1
    system_prompt: str = ""
    max_length: int = 512
    row_length: int = 0
    overlong: str = "chunk"
    on_error: str = "raise"
    columns: tuple[str, ...] = ()
    prompt_template: str = ""
    on_role_order: str = "merge"
    thoughts: str = "keep"
    packing: bool = True
    dedup: str = "normalized"
    near_dedup_threshold: float = 0.0
    mixture_temperature: float = 1.0
    mixture_max_repeats: float = 0.0
    mixture_max_examples: int = 0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685).

    Attributes:
        rank: Rank R of the factors.
        alpha: Scale: updates are multiplied by alpha / rank. 0: the same as `rank`, as in KerasHub's `enable_lora`.
        target_layers: Layer names, or one of the groups `attention` and `all-linear`. The default is KerasHub's.
        layout: Shapes of the factors. `keras`, as in `enable_lora`: queries, keys and values have a factor A for each
            head, and a factor B that their heads share. `peft`: factors of the flattened matrix, as everywhere else.
        use_rslora: Whether updates are multiplied by alpha / sqrt(rank) instead (arXiv:2312.03732), so that a high rank
            learns as fast as a low one.
        use_dora: Whether the magnitude of each output's weights is trained too, apart from their direction
            (arXiv:2402.09353).
        dropout: Rate of dropout on the input of A, in training alone, as in PEFT: this share of the input's numbers is
            zero, the others are larger instead. The embedding has none.
        loraplus_lr_ratio: Learning rate of B divided by that of A (LoRA+, arXiv:2402.12354, where 16 suits many tasks).
    """

    rank: int = 4
    alpha: float = 0.0
    target_layers: tuple[str, ...] = ("query", "value")
    layout: str = "keras"
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0
    loraplus_lr_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule (Optax) and its learning rate over time.

    Attributes:
        name: Update rule: `adamw`, `adafactor`, `lion` or `sgd`.
        learning_rate: Peak learning rate. 0: 5e-4 for LoRA, and a tenth of it, 5e-5, for full fine-tuning, as in "LoRA
            Without Regret" (Thinking Machines, 2025).
        schedule: Learning rate after the warm-up: `constant`, `linear` (to zero) or `cosine` (to zero).
        warmup_steps: Number of steps of linear warm-up from zero.
        weight_decay: Decoupled weight decay. Norms, biases and other vectors have none.
        b1: First decay rate of adamw and lion; momentum of sgd.
        b2: Second decay rate of adamw and lion.
        epsilon: Epsilon of adamw.
        clip_norm: Largest global norm of the gradients, which are scaled down to it; 0: no limit.
    """

    name: str = "adamw"
    learning_rate: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How training runs: method, length, batches, compilation, evaluation and checkpoints.

    Attributes:
        method: What is trained: `lora`, `qlora` (LoRA on quantized weights) or `full` (all weights).
        qat: Scheme of quantization-aware training: `int8`, `int4` or `nf4`, with `model.block_size`. It computes with
            rounded weights, so that quantizing the trained model changes nothing. Empty: none.
        num_epochs: Number of passes over the training data.
        num_train_steps: Number of steps after which training stops; 0: it stops after `num_epochs`.
        batch_size: Number of rows of `data.max_length` tokens in one optimizer step.
        grad_accum_steps: Number of micro-batches that a batch is cut into, to save memory; must divide `batch_size`.
        remat: Rematerialization: which activations the backward pass computes again instead of saving them. `none`;
            `dots`: all but the outputs of matrix products (half the memory); `full`: all but each decoder block's input
            (hardly any memory, a fifth slower).
        program: How a training step is compiled. `whole`: as one program; `per_block`: one program for each kind of
            decoder block, which compiles in a second and takes less memory; `auto`: per_block on CPU, otherwise whole.
        attention: Attention kernel for training: `xla` (plain products, on any device), `cudnn` (NVIDIA GPUs), `splash`
            (TPUs), `keras` (KerasHub's own), or `auto`: the fastest that can be used.
        mesh: Devices to spread the run over: `data:2,fsdp:2,model:2`, with any of these axes (gemma_tune/mesh.py), or
            `auto`: all devices. Empty: one device. A run may be resumed on another mesh.
        eval_every_steps: Number of steps between evaluations on held-out data, which also take place at the start and
            at the end; 0: only there.
        checkpoint_every_steps: Number of steps between checkpoints, which are also written at the end, on Ctrl-C and on
            SIGTERM; 0: only there.
        keep_last: Number of checkpoints to keep besides the best one.
        eval_metrics: Metrics of answers to held-out questions that each evaluation computes besides the loss, such as
            `f1` (gemma_tune/evaluation/metrics).
        num_eval_answers: Number of held-out questions that are answered for them, the same ones each time.
        best_by: Held-out metric whose best value says which step's weights are saved: `loss`, `perplexity`,
            `token_accuracy`, or a metric of answers.
        early_stopping_patience: Number of evaluations without a better value of `best_by` after which training stops;
            0: never.
        log_every_steps: Number of steps between lines in `metrics.jsonl` and in trackers.
        report_to: Trackers of metrics: `tensorboard` (files in the workdir), `mlflow`, `wandb`, `trackio`.
        report_artifacts: Files that trackers get at the end: `report` (`report.html`, which shows questions and
            answers), `adapter`. TensorBoard takes none.
        on_bad_step: What happens when a step's loss or gradients are not finite, or its loss is a spike: `stop`, or
            `skip`, which leaves its update out. Its examples are written to `bad_steps.jsonl`.
        loss_spike_factor: Multiple of the usual loss from which a loss is a spike; 0: none is.
        num_sample_answers: Number of held-out questions answered before and after training, shown side by side.
        num_scored_answers: Number of held-out questions whose answers are compared with the wanted ones at the end.
    """

    method: str = "lora"
    qat: str = ""
    num_epochs: int = 3
    num_train_steps: int = 0
    batch_size: int = 4
    grad_accum_steps: int = 1
    remat: str = "dots"
    program: str = "auto"
    attention: str = "auto"
    mesh: str = ""
    eval_every_steps: int = 50
    checkpoint_every_steps: int = 50
    keep_last: int = 2
    eval_metrics: tuple[str, ...] = ()
    num_eval_answers: int = 20
    best_by: str = "loss"
    early_stopping_patience: int = 0
    log_every_steps: int = 1
    report_to: tuple[str, ...] = ("tensorboard",)
    report_artifacts: tuple[str, ...] = ("report",)
    on_bad_step: str = "stop"
    loss_spike_factor: float = 0.0
    num_sample_answers: int = 5
    num_scored_answers: int = 20


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated.

    Attributes:
        max_new_tokens: Maximum length of an answer, in tokens.
        temperature: Temperature of sampling; 0: greedy decoding, always the most likely token.
        top_k: Number of most likely tokens to sample from; 0: all.
        top_p: Probability of the smallest set of tokens to sample from; 1: all.
        min_p: Least probability of a token to sample, as a share of the most likely token's; 0: none.
        repetition_penalty: Divisor of the positive logits, and factor of the negative ones, of tokens that have
            occurred in prompt or answer; 1: no change.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
