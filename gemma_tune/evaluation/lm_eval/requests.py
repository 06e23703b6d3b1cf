"""Answers lm-eval's requests with a model: log-likelihoods, texts, and chat prompts."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.likelihood.log_likelihood import MAX_LENGTH, LogLikelihoodScorer
from gemma_tune.models.family import family_of
from gemma_tune.runtime import progress
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.prompt_encoder import prompt_encoder_of
from gemma_tune.serving.sampling import Sampling
from gemma_tune.serving.text_stream import TextStream

_ROLES = {"system": "system", "user": "user", "assistant": "model"}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GENERATION = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "seed", *_SAMPLING)
_MAX_NEW_TOKENS = 256  # lm-eval's own default.


class ModelRequests:
    """The methods of lm-eval's `TemplateLM` that depend on the model.

    A text begins with `<bos>`, without which a Gemma predicts nonsense; one that it begins with is not repeated.

    Args:
        model: CausalLM from `load_model` or `train`, on one device or on a mesh. It is left as it is.
        max_length: Most tokens of a request; longer contexts lose their beginning.
        batch_size: Number of answers generated together.
    """

    def __init__(self, model: keras.Model, max_length: int = MAX_LENGTH, batch_size: int = 8):
        super().__init__()  # lm-eval's own, which sets rank and cache.
        self.max_length, self.batch_size = max_length, batch_size
        self._encoder, self._decoder = prompt_encoder_of(model), decoder_of(model)
        self._scorer = LogLikelihoodScorer(model, max_length)
        tokenizer = self._encoder.tokenizer
        digest = hashlib.sha256(tokenizer.proto).hexdigest()[:16]
        self._name = f"gemma_tune-{family_of(model)}-{digest}"
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text: `<bos>`."""
        return self._bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name that differs for other chat templates and vocabularies, for lm-eval's cache of requests."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the token ids of a text, with `<bos>` unless `add_special_tokens` is False."""
        ids = self._encoder.encode_text(string)
        return ids[1:] if add_special_tokens is False and not string.startswith(self._encoder.template.bos) else ids

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text of the family's chat template.

        Args:
            chat_history: Messages with `role` and `content`.
            add_generation_prompt: Whether an answer follows. Otherwise the last message is the beginning of one.
        """
        turns = [Turn(_ROLES[message["role"]], message["content"]) for message in chat_history]
        if add_generation_prompt or not turns or turns[-1].role != "model":
            return self._encoder.template.render(turns, add_generation_prompt=add_generation_prompt)
        return self._encoder.template.render(turns[:-1], add_generation_prompt=True) + turns[-1].content

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability, whether it is greedy) of each continuation."""
        with _progress("log-likelihoods", len(requests), disable_tqdm) as advance:
            scores = self._scorer.score([(context, rest) for _, context, rest in requests], advance)
        answers = [(score.log_prob, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self._remember("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text."""
        texts = [request.args[0] for request in requests]
        ids = [self._encoder.encode_text(text)[1:] for text in texts]
        num_windows = sum(-(-len(text) // self.max_length) for text in ids)
        with _progress("windows of texts", num_windows, disable_tqdm) as advance:
            scores = self._scorer.score_rolling(ids, self._bos_id, advance)
        for text, score in zip(texts, scores, strict=True):
            self._remember("loglikelihood_rolling", (text,), score)
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that follows each context, up to a stop string or the end of the model's turn."""
        answers = [""] * len(requests)
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        with _progress("answers", len(requests), disable_tqdm) as advance:
            for numbers in self._together([request.args[1] for request in requests], encoded):
                settings = requests[numbers[0]].args[1]
                texts = self._generate([encoded[number] for number in numbers], settings)
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
                    self._remember("generate_until", requests[number].args, text)
                advance(len(numbers))
        return answers

    def _together(self, settings: Sequence[Mapping[str, Any]], encoded: Sequence[list[int]]) -> Iterator[list[int]]:
        """Yields the numbers of requests with equal settings, those of similar length together."""
        names = [repr(sorted(each.items(), key=lambda item: item[0])) for each in settings]
        order = sorted(range(len(names)), key=lambda number: (names[number], len(encoded[number])))
        for _, group in itertools.groupby(order, key=names.__getitem__):
            numbers = list(group)
            yield from (numbers[at : at + self.batch_size] for at in range(0, len(numbers), self.batch_size))

    def _generate(self, prompts: Sequence[list[int]], settings: Mapping[str, Any]) -> list[str]:
        until, max_new_tokens, sampling, seed = generation_settings(settings)
        if max_new_tokens >= self.max_length:
            raise ConfigError(f"max_gen_toks is {max_new_tokens}; it must be below max_length, {self.max_length}.")
        kept = [prompt[-(self.max_length - max_new_tokens) :] for prompt in prompts]
        streams = [TextStream(self._encoder.tokenizer.decode, until) for _ in prompts]
        texts = ["" for _ in prompts]
        for tokens in self._decoder.generate(kept, max_new_tokens, self._encoder.stop_ids, sampling, seed):
            for row, token in enumerate(tokens):
                if token is not None and not streams[row].stopped:
                    texts[row] += streams[row].push(token)
            # A row whose turn has ended gets no token any more.
            if all(stream.stopped or token is None for stream, token in zip(streams, tokens, strict=True)):
                break
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]

    def _remember(self, kind: str, request: Any, answer: Any) -> None:
        """Stores an answer in lm-eval's cache, if it has one, so that an interrupted evaluation goes on."""
        hook: Callable[[str, Any, Any], None] = self.cache_hook.add_partial  # type: ignore[attr-defined]
        hook(kind, request, answer)


def _progress(
    description: str, total: int, is_disabled: bool
) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    return contextlib.nullcontext(lambda count: None) if is_disabled else progress.track_progress(description, total)


def generation_settings(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling, int]:
    """Returns stop strings, most new tokens, sampling settings and random seed of lm-eval's `generation_kwargs`.

    Generation is greedy unless `do_sample` is true or a temperature is given, as in lm-eval.

    Raises:
        ConfigError: There is no such setting.
    """
    for name in settings:
        if name not in _GENERATION:
            raise ConfigError(
                f"generation_kwargs has {name!r}, which isn't supported.{did_you_mean(name, _GENERATION)} Supported: "
                f"{', '.join(_GENERATION)}."
            )
    until = settings.get("until") or []
    longest = next((settings[name] for name in _GENERATION[1:4] if settings.get(name)), _MAX_NEW_TOKENS)
    sampling = Sampling(**{name: settings[name] for name in _SAMPLING if settings.get(name) is not None})
    if settings.get("do_sample") is False:
        sampling = sampling._replace(temperature=0.0)
    elif settings.get("do_sample") and "temperature" not in settings:
        sampling = sampling._replace(temperature=1.0)
    return [until] if isinstance(until, str) else list(until), int(longest), sampling, int(settings.get("seed") or 0)
