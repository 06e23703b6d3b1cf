"""One tree of frozen dataclasses: every setting of a run, its default, and its check.

This is the only place where a default stands. `Config()` is a complete, valid run. Settings are named by their path
in the tree, `lora.rank`, in flags (`--config.lora.rank=8`), in error messages and in a run's `config.json`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_tune.config_checks import check_values
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.saved_settings import in_current_words
from gemma_tune.settings import check_types, from_plain, setting_paths, to_plain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and in which number format.

    Attributes:
        source: A preset, `kaggle://…`, `hf://…`, a directory, a `.gguf` file, `demo`, `tiny` or `tiny:FAMILY`, or the
            workdir of an earlier run (its base model with its adapter).
        precision: `float32`; `bfloat16` or `float16` (weights and arithmetic); `mixed_bfloat16` or `mixed_float16`
            (float32 weights, 16-bit arithmetic). Training in float16 scales the loss. What stays float32:
            models/precision.py.
        quantize: Holds the weights of linear layers and embedding in few bits: `int8`, `int4` or `nf4` (QLoRA,
            arXiv:2305.14314). Empty: `nf4` with training.method=qlora, else not.
        block_size: Weights of int4 and nf4 that share a scale: 32, 64, 128 or 256.
        double_quant: Also quantizes these scales, to eight bits.
        or_int8: Takes int8 for layers whose inputs `block_size` doesn't divide.
        adapter: LoRA factors to go on training, of an earlier run or from PEFT: a file or folder. Their rank, alpha,
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
    """What to learn from, and how it becomes batches.

    Attributes:
        source: Files (globs and comma-separated lists allowed), `tfds:name/config`, or `sample:NAME`.
        eval_source: Held-out data of its own, named like `source`. Empty: the sample's own held-out set if `source` is
            a sample that has one, else `eval_fraction` of `source`.
        split: Split to read from a TFDS data set.
        eval_split: Split of the same TFDS data set to hold out; empty: hold out `eval_fraction` of `split`.
        eval_fraction: Share of the questions to hold out, chosen by content hash.
        system_prompt: A system turn put before every conversation that has none.
        max_length: Longest example, in tokens.
        row_length: Length of a packed row, in tokens; 0: `max_length`. Longer rows leave less room unfilled, above all
            when examples are not much shorter than max_length, and take as much more memory.
        overlong: What to do with longer examples: `truncate` (counted), `drop` (counted) or `error`.
        on_error: What to do with unreadable rows: `raise`, or `skip` (counted and reported).
        packing: Put several examples into one row, kept apart by the attention mask.
    """

    source: str = "sample:smartphone_support"
    eval_source: str = ""
    split: str = "train"
    eval_split: str = ""
    eval_fraction: float = 0.1
    system_prompt: str = ""
    max_length: int = 512
    row_length: int = 0
    overlong: str = "truncate"
    on_error: str = "raise"
    packing: bool = True


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685).

    Attributes:
        rank: Width R of the factors.
        alpha: The update is scaled by alpha / rank. 0: the same as `rank`, as KerasHub's `enable_lora` does.
        target_layers: Layer names, or one of the groups `attention` and `all-linear`. The default is KerasHub's.
        layout: `keras`, as `enable_lora`: queries, keys and values have a factor A for each head, and a B that their
            heads share. `peft`: factors of the flattened matrix, as everywhere else.
        use_rslora: Scales by alpha / sqrt(rank) (arXiv:2312.03732), so that a high rank learns as fast as a low one.
        use_dora: Also trains the length of each output's weights, apart from their direction (arXiv:2402.09353).
        loraplus_lr_ratio: The learning rate of B is so many times that of A (LoRA+, arXiv:2402.12354, which found 16 to
            suit many tasks).
    """

    rank: int = 4
    alpha: float = 0.0
    target_layers: tuple[str, ...] = ("query", "value")
    layout: str = "keras"
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule (Optax) and its learning rate over time.

    Attributes:
        name: `adamw`, `adafactor`, `lion` or `sgd`.
        learning_rate: Peak. 0: 5e-4 for LoRA and 5e-5 for full fine-tuning, a tenth of it, as "LoRA Without Regret"
            (Thinking Machines, 2025) found.
        schedule: `constant`, `linear` (to zero) or `cosine` (to zero), after the warm-up.
        warmup_steps: Steps of linear warm-up from zero.
        weight_decay: Decoupled; never on norms, biases and other vectors.
        b1, b2, epsilon: Of adamw; lion uses b1 and b2, sgd uses b1 as momentum.
        clip_norm: Gradients are scaled down to this global norm; 0 switches it off.
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
    """How long, in which portions, and what is kept.

    Attributes:
        method: `lora`, `qlora` (LoRA on quantized weights) or `full`.
        qat: Quantization-aware training: computes with weights rounded to `int8`, `int4` or `nf4` (with
            `model.block_size`), so that converting the trained model to it changes nothing. Empty: not.
        num_epochs: Passes over the training data.
        num_train_steps: Stop after so many steps; 0: after `num_epochs`.
        batch_size: Rows of `data.max_length` tokens in one optimizer step.
        grad_accum_steps: Portions in which a batch goes through the model, to save memory; must divide `batch_size`.
        remat: What the backward pass computes anew instead of keeping it: `none`, `dots` (all but products
            with weights: half the memory for activations) or `full` (all but each block's input: hardly any memory,
            a fifth slower).
        program: How a step is compiled: `whole`, one program; `per_block`, one for each kind of decoder block, which
            compiles in a second and takes less memory; `auto`: per_block on CPU, else whole.
        attention: Kernel for training: `xla` (plain products, anywhere), `cudnn` (NVIDIA GPUs),
            `splash` (TPUs), `keras` (KerasHub's own), or `auto`: the fastest that can be used.
        mesh: Spreads the run over devices: `data:2,fsdp:2,model:2`, any of these axes (gemma_tune/mesh.py), or `auto`,
            which takes all there are. Empty: one device. Another mesh may go on with the run.
        eval_every_steps: Held-out loss every so many steps, and always at the start and the end; 0: only then.
        checkpoint_every_steps: 0: only at the end, on Ctrl-C and on SIGTERM.
        keep_last: Checkpoints to keep besides the best one.
        early_stopping_patience: Stop after so many evaluations without a better held-out loss; 0: never.
        log_every_steps: Metrics go to `metrics.jsonl` and TensorBoard every so many steps.
        on_bad_step: When a step's loss or gradient is no number, or its loss a spike: `stop`, or `skip`, which leaves
            its update out. Which examples it held goes to `bad_steps.jsonl`.
        loss_spike_factor: A loss so many times the usual one is a spike; 0: none is.
        num_sample_answers: Held-out questions answered before and after training, and shown side by side.
        num_scored_answers: Held-out questions whose answers are compared with the wanted ones at the end.
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
    early_stopping_patience: int = 0
    log_every_steps: int = 1
    on_bad_step: str = "stop"
    loss_spike_factor: float = 0.0
    num_sample_answers: int = 5
    num_scored_answers: int = 20


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are written.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0: greedy. Higher: bolder sampling.
        top_k: Sample from the k likeliest tokens; 0: from all.
        top_p: Sample from the smallest set of tokens that holds this much probability; 1: from all.
        min_p: Leave out tokens that are less than this times as likely as the likeliest; 0: none.
        repetition_penalty: Divides the positive logits of tokens that have occurred, in prompt or answer, and
            multiplies the negative ones; 1: no change.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        workdir: Folder of the run: everything it writes. The same command on the same workdir goes on where it was.
        seed: Of the weights of tiny models, LoRA factors, data split and order, and sampling.
    """

    workdir: str = "runs/gemma_tune"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self):
        check_types(self, "")
        check_values(self)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, with the method's default filled in."""
        if self.optimizer.learning_rate:
            return self.optimizer.learning_rate
        return 5e-5 if self.training.method == "full" else 5e-4

    @property
    def quant_spec(self) -> QuantSpec | None:
        """How weights are quantized, with the method's default filled in."""
        scheme = self.model.quantize or ("nf4" if self.training.method == "qlora" else "")
        model = self.model
        return QuantSpec(scheme, model.block_size, model.double_quant, model.or_int8) if scheme else None

    @property
    def qat_spec(self) -> QuantSpec | None:
        """How training rounds weights, and how the trained model is to be quantized; None without QAT."""
        model = self.model
        return QuantSpec(self.training.qat, model.block_size, or_int8=model.or_int8) if self.training.qat else None

    @property
    def row_length(self) -> int:
        """The length of a row, with its default filled in."""
        return self.data.row_length or self.data.max_length

    @property
    def lora_alpha(self) -> float:
        """alpha, with its default filled in."""
        return self.lora.alpha or float(self.lora.rank)

    @property
    def lora_settings(self) -> dict[str, Any]:
        """What a model's LoRA factors are made from, with defaults filled in."""
        lora = self.lora
        return {
            "rank": lora.rank,
            "alpha": self.lora_alpha,
            "target_layers": lora.target_layers,
            "seed": self.seed,
            "layout": lora.layout,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
        }

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """What the optimizer is made from, but for its learning rate over time."""
        optimizer = self.optimizer
        names = ("name", "weight_decay", "b1", "b2", "epsilon", "clip_norm")
        return {name: getattr(optimizer, name) for name in names} | {"loraplus_lr_ratio": self.lora.loraplus_lr_ratio}

    def replace(self, settings: Mapping[str, Any]) -> "Config":
        """Returns a copy with some settings changed: `config.replace({"lora.rank": 8})`."""
        tree = self.to_dict()
        for path, value in settings.items():
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node[parent] if isinstance(node.get(parent), dict) else {}
            if leaf not in node:
                raise ConfigError(f"There is no setting {path!r}.{did_you_mean(path, setting_paths(Config))}")
            node[leaf] = value
        return Config.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of plain values; tuples become lists, as in JSON."""
        return to_plain(self)

    @staticmethod
    def from_saved(tree: Mapping[str, Any]) -> "Config":
        """Builds the Config that a run's `config.json` holds, whichever version wrote it. Errors as in `from_dict`."""
        return Config.from_dict(in_current_words(tree) if isinstance(tree, Mapping) else tree)

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "Config":
        """Builds a Config from nested dicts. Missing settings take their default; an unknown one is an error."""
        return from_plain(Config, tree)
