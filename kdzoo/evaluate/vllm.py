"""Generation with vLLM, many times as fast on a GPU, where nothing is asked that it cannot do the same way.

Prompts reach it as our own tokens, and an answer ends where ours does. Its sampling draws other numbers than ours.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdzoo.data.encode import Encoder
from kdzoo.errors import KdzooError
from kdzoo.evaluate.generation import answer_text, prompt_tokens
from kdzoo.recipe.model import Decoding

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def require_vllm(decodings: Mapping[str, Decoding]) -> None:
    """Raises KdzooError where vLLM is not installed, or a decoding is beyond it: worth asking before anything loads."""
    for name, decoding in decodings.items():
        if decoding.no_repeat_ngram_size:
            raise KdzooError(
                f"--engine vllm: it cannot forbid repeated n-grams, and '{name}' asks for it; give "
                "'--no-repeat-ngram-size 0', which is another protocol, or leave the engine out"
            )
    try:
        importlib.import_module("vllm")
    except ImportError as error:
        raise KdzooError("--engine vllm: the package is not there; pip install 'kdzoo[vllm]'") from error


class VllmGenerator:
    """Answers by vLLM from the model in a folder, on `gpus` devices."""

    def __init__(self, folder: Path, encoder: Encoder, max_new_tokens: int, precision: str, gpus: int) -> None:
        self.vllm: Any = importlib.import_module("vllm")
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self.model = self.vllm.LLM(
            model=str(folder),
            dtype=DTYPES[precision],
            tensor_parallel_size=gpus,
            max_model_len=encoder.data.max_prompt_length + max_new_tokens,
            seed=0,
            disable_log_stats=True,
        )

    def __call__(
        self, prompts: Sequence[str], decoding: Decoding, seed: int, on_batch: Callable[[int], None]
    ) -> list[str]:
        tokenizer, data = self.encoder.tokenizer, self.encoder.data
        tokens = prompt_tokens(tokenizer, prompts, data.max_prompt_length, not data.template.chat)
        found = self.model.generate(
            [{"prompt_token_ids": ids} for ids in tokens],
            [self.sampling(decoding, seed, prompt) for prompt in prompts],
            use_tqdm=False,
        )
        on_batch(len(prompts))
        return [answer_text(tokenizer, list(one.outputs[0].token_ids)) for one in found]

    def sampling(self, decoding: Decoding, seed: int, prompt: str) -> Any:
        """Random numbers of a prompt's own, as in our generation; nothing of the model's own configuration."""
        drawn = decoding.sample
        return self.vllm.SamplingParams(
            temperature=decoding.temperature if drawn else 0.0,
            top_p=decoding.top_p if drawn else 1.0,
            seed=random.Random(f"{seed}\n{prompt}").getrandbits(31) if drawn else None,
            max_tokens=self.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=[self.encoder.tokenizer.eos_token_id],
            detokenize=False,
        )
