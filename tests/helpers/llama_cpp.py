"""llama.cpp through xllamacpp: its server, run in this process and asked over HTTP."""

import ctypes
import json
import urllib.request

import numpy as np


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded.

    Keys and values are held in float32, as ours are, and attention is not fused, so that nothing but the products' own
    arithmetic differs.
    """

    def __init__(self, path, context_length=128):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = params.n_ubatch = context_length
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True
        params.warmup = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        self._server = xllamacpp.Server(params)

    def tokenize(self, text):
        """Returns token ids; text that spells a control token becomes that token, and no <bos> is added."""
        return self._post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def render(self, messages):
        """Returns a conversation as the file's chat template renders it, open for the model's turn."""
        return self._post("/apply-template", messages=messages)["prompt"]

    def next_log_probs(self, token_ids, vocabulary_size):
        """Returns [L, V] log-probabilities of the token that follows each position, given all tokens up to it.

        The server returns them for tokens that it generates alone. So each prefix is a prompt of its own; the KV cache
        is kept, and each request computes one position more.
        """
        rows = np.full((len(token_ids), vocabulary_size), np.nan)
        for length in range(1, len(token_ids) + 1):
            answer = self._complete(token_ids[:length], 1, n_probs=vocabulary_size)
            for candidate in answer["completion_probabilities"][0]["top_logprobs"]:
                rows[length - 1, candidate["id"]] = candidate["logprob"]
        return rows

    def generate(self, token_ids, num_tokens):
        """Returns the greedy continuation; one that ends earlier includes the token that ended it."""
        return self._complete(token_ids, num_tokens, return_tokens=True)["tokens"]

    def _complete(self, token_ids, num_tokens, **settings):
        return self._post(
            "/completion", prompt=token_ids, n_predict=num_tokens, temperature=0, cache_prompt=True, **settings
        )

    def _post(self, path, **body):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)


def ggml_quantize(values, tensor_type):
    """Returns the bytes of [rows, columns] float32 as ggml's own quantizer writes them, [rows, bytes in a row].

    Args:
        values: Weights.
        tensor_type: `gguf.GGMLQuantizationType`.
    """
    import gguf
    import xllamacpp.xllamacpp

    quantize = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    values = np.ascontiguousarray(values, np.float32)
    num_rows, num_columns = values.shape
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    coded = np.empty((num_rows, num_columns // block_size * block_bytes), np.uint8)
    size = quantize(int(tensor_type), values.ctypes.data, coded.ctypes.data, 0, num_rows, num_columns, None)
    assert size == coded.nbytes
    return coded
