"""llama.cpp in this process, through xllamacpp: opens a GGUF model, with an adapter or without, and continues tokens.

It is set to be compared: keys and values in float32, attention as it is written down, one request at a time. What it
gives of a position are probabilities, not logits: these are known up to a constant, so token agreement judges.

Requests go to llama.cpp's own server, which xllamacpp runs in this process and which listens on loopback alone. Its
Python method answers as OpenAI does, with text, and leaves out a token that ends within a character.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from edge_runtime.errors import ExportError, missing_extra
from export.subject import Logits

try:
    import xllamacpp
except ModuleNotFoundError as missing:
    raise missing_extra("xllamacpp", "verify") from missing

CONTEXT = 2048
"""Tokens of a prompt and its continuation, at most; their keys and values are allocated when a model is opened."""
_PLAIN_NEXT = [["a", 1e4]]
# Added to the logits after their probabilities were taken: of a token that ends within a character, none would be said.


def open_llama(model: Path, adapter: Path | None = None, *, on_close: Callable[[], None] = lambda: None) -> LlamaEngine:
    """A GGUF model in llama.cpp.

    Args:
        model: the file.
        adapter: a GGUF adapter of that model.
        on_close: is called when the engine is closed.

    Raises:
        ExportError: llama.cpp does not accept the files; it gives no reason but in its log.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel = CONTEXT, 1
    params.n_gpu_layers = 0
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        files = str(model) if adapter is None else f"{model} and {adapter}"
        raise ExportError(f"expected llama.cpp to open {files}; found: {str(error).strip()}; export again") from error
    return LlamaEngine(server, on_close)


@dataclass(eq=False)
class LlamaEngine:
    """A model in llama.cpp; see `export.subject.Engine`."""

    server: Any
    on_close: Callable[[], None]

    def logits(self, tokens: Sequence[int]) -> Logits:  # noqa: ARG002 - engines are asked alike
        """Nothing: llama.cpp gives probabilities, from which logits are known only up to a constant.

        Raises:
            ExportError: always.
        """
        raise ExportError("llama.cpp gives no logits, but probabilities; compare greedy tokens")

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> Logits:
        """The logarithm of each token's probability after each token of one prompt.

        Args:
            tokens: the prompt. Each of its beginnings is a request, which reuses the cache of the one before.
            vocabulary: rows of the model's embedding.

        Returns:
            (len(tokens), vocabulary), float32: the logits less one constant for each position.
        """
        found = np.full((len(tokens), vocabulary), -np.inf, np.float32)
        for position in range(len(tokens)):
            answer = self._completed(tokens[: position + 1], 1, n_probs=vocabulary, logit_bias=_PLAIN_NEXT)
            for each in answer["completion_probabilities"][0]["top_logprobs"]:
                found[position, each["id"]] = each["logprob"]
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens; one that would end an answer is gone on from like any other.

        Raises:
            ExportError: more tokens than there is room for.
        """
        found: list[int] = []
        while len(found) < count:
            more = self._completed([*tokens, *found], count - len(found))["tokens"]
            if not more:
                raise ExportError(f"expected llama.cpp to continue {len(tokens)} tokens by {count}; it stops at none")
            found += more
        return found

    def tokens_of(self, text: str) -> list[int]:
        """A text as llama.cpp's own tokenizer cuts it, without a token before or after it."""
        answer = self._answer("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def close(self) -> None:
        """End the server's threads and give the model's memory back."""
        self.server = None
        self.on_close()

    def _completed(self, prompt: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        """The server's answer: with fewer than `count` tokens where one of them ends an answer."""
        return self._answer(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": count,
                "temperature": 0,
                "return_tokens": True,
                "cache_prompt": True,
                **more,
            },
        )

    def _answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.server.listening_address).netloc)
        try:
            connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ExportError(f"expected llama.cpp to answer {path}; found: {error!r}; try again") from error
        finally:
            connection.close()
        if "error" in answer:
            raise ExportError(f"expected llama.cpp to answer {path}; found: {answer['error']['message']}")
        return answer
