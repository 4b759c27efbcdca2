"""Maps between the entries of two vocabularies: those that say the same, and those that say nearly the same.

The nearest entry is that of Wan et al., Knowledge Fusion of Large Language Models, ICLR 2024, arxiv.org/abs/2401.10491
(fanqiwan/FuseAI @ 7d9a307, FuseLLM/src/utils/vocab_mapping.py): the same text, or else the fewest edits, of several the
first. Here texts are compared, not spellings, and what has nothing in common has no partner.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdzoo.api.entries import EntryMap
from kdzoo.cache import cached_folder
from kdzoo.data.tokenizer import same_tokens, speaking_tokens, student_ids, tokens_by_text, tokens_fingerprint

FILE = "partners.npy"
BLOCK = 512
"""Texts that are compared at a time with a whole vocabulary: some ten megabytes."""


def entry_maps(
    names: Collection[EntryMap],
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    sizes: tuple[int, int],
) -> dict[EntryMap, Tensor]:
    """The maps of these names, for heads of `sizes` entries: the student's and the teacher's.

    Distances are computed once (a minute for the largest vocabularies), and then read from the cache.
    """
    v, w = sizes
    same = student_ids(student, teacher, sizes)
    found: dict[EntryMap, Tensor] = {"same_text": same}
    if same_tokens(student, teacher):
        found |= {"nearest_in_student": same, "nearest_in_teacher": student_ids(teacher, student, (w, v))}
    else:
        if "nearest_in_student" in names:
            found["nearest_in_student"] = _fitted(cached_nearest(teacher, student), w, v)
        if "nearest_in_teacher" in names:
            found["nearest_in_teacher"] = _fitted(cached_nearest(student, teacher), v, w)
    return {name: found[name] for name in names}


MADE_BY = (Path(__file__), Path(inspect.getfile(student_ids)))
"""The files whose code decides which entries are near."""


def cached_nearest(from_tokenizer: PreTrainedTokenizerFast, to_tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The same as `nearest`, from the cache where it is there."""
    made_from = {
        "from": tokens_fingerprint(from_tokenizer),
        "to": tokens_fingerprint(to_tokenizer),
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in MADE_BY],
    }
    folder = cached_folder(
        "entries", made_from, lambda folder: np.save(folder / FILE, nearest(from_tokenizer, to_tokenizer).numpy())
    )
    return torch.from_numpy(np.load(folder / FILE))


def nearest(from_tokenizer: PreTrainedTokenizerFast, to_tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[entries of the one] the other's entry of the same text, or else of the fewest edits, the first of several.

    -1 for special tokens and parts of characters, and where as many characters differ as the text has, spaces aside.
    """
    partners = student_ids(to_tokenizer, from_tokenizer, (len(to_tokenizer), len(from_tokenizer)))
    texts = speaking_tokens(from_tokenizer)
    wanted = sorted({text for token, text in texts.items() if partners[token] < 0}, key=len)  # alike at a time: faster
    choices = sorted((token, text) for text, token in tokens_by_text(to_tokenizer).items() if text)
    found: dict[str, int] = {}
    for start in range(0, len(wanted) if choices else 0, BLOCK):
        block = wanted[start : start + BLOCK]
        letters = np.array([len("".join(text.split())) for text in block])
        distances = cdist(
            block,
            [text for _, text in choices],
            scorer=Levenshtein.distance,
            score_cutoff=int(letters.max()),
            dtype=np.uint16,
            workers=-1,
        )
        best = distances.argmin(1)
        near = distances[np.arange(len(block)), best] < letters
        found |= {text: choices[place][0] for text, place, is_near in zip(block, best, near, strict=True) if is_near}
    for token, text in texts.items():
        if partners[token] < 0:
            partners[token] = found.get(text, -1)
    return partners


def _fitted(partners: Tensor, size: int, others: int) -> Tensor:
    """The same for heads of `size` and of `others` entries, which may be more or fewer than the tokenizers'."""
    fitted = partners.new_full((size,), -1)
    both = min(size, len(partners))
    fitted[:both] = partners[:both]
    return torch.where(fitted < others, fitted, -1)
