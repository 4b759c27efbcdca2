from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import multiprocessing
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdzoo.errors import ModelError
from kdzoo.evaluate.generation import Draw, NoRepeatNgram, continue_prompts, require_positions
from kdzoo.recipe.model import Decoding

PROMPTS = [
    "name the colour of the sea",
    "why",
    "tell me a long story about the lighthouse keeper and his seven grey cats in the north",
    "how many legs has a spider",
    "sing",
    "where is the key to the garden gate that grandmother painted green",
]
GREEDY = Decoding()
SAMPLE = Decoding(sample=True, seeds=[10, 20])


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; with special tokens, a text starts with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=8)


def tiny_model(family: str, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = {
        "gpt2": GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=96, **special),
        "llama": LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            initializer_range=0.3,
            **special,
        ),
    }[family]
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small wait for each other on several threads: many times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained_tokenizer()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model(request.param, len(tokenizer))


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """What transformers would have shown: its logger does not propagate."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def answers(model, tokenizer, prompts=PROMPTS, decoding=GREEDY, seed=10, **changed) -> list[str]:
    settings = {
        "max_new_tokens": 12,
        "max_prompt_length": 64,
        "batch": 4,
        "add_special_tokens": False,
        **changed,
    }
    return [found.text for found in continue_prompts(model, tokenizer, prompts, decoding, seed, **settings)]


def greedy_by_hand(model, tokenizer, ids: list[int], steps: int) -> str:
    """One prompt, no padding, no cache, no `generate`."""
    model.eval()
    new: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_greedy_answers_equal_a_plain_loop_over_single_prompts(model, tokenizer):
    wanted = [
        greedy_by_hand(model, tokenizer, tokenizer(p, add_special_tokens=False)["input_ids"], 12) for p in PROMPTS
    ]
    assert answers(model, tokenizer) == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLE, Decoding(sample=True, temperature=0.7, top_p=0.8)])
def test_answers_do_not_depend_on_batch_size_order_or_company(model, tokenizer, decoding):
    whole = answers(model, tokenizer, decoding=decoding)
    for batch in (1, 3, 50):
        assert answers(model, tokenizer, decoding=decoding, batch=batch) == whole
    assert answers(model, tokenizer, PROMPTS[::-1], decoding=decoding) == whole[::-1]
    assert answers(model, tokenizer, PROMPTS[1::2], decoding=decoding) == whole[1::2]  # the share of one of two ranks


def test_sampling_is_repeatable_and_differs_between_seeds_and_prompts(model, tokenizer):
    state = torch.random.get_rng_state()
    first = answers(model, tokenizer, decoding=SAMPLE)
    assert answers(model, tokenizer, decoding=SAMPLE) == first
    assert answers(model, tokenizer, decoding=SAMPLE, seed=20) != first
    assert len(set(first)) == len(PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_draw_follows_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2])
    n = 4000
    uniforms = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    scores = probabilities.log().expand(n, -1)
    drawn = Draw(uniforms, prompt_width=3)(torch.zeros(n, 3, dtype=torch.long), scores).argmax(-1)
    assert torch.allclose(drawn.bincount(minlength=5) / n, probabilities, atol=1 / n)


def test_top_p_and_temperature_narrow_what_is_drawn(model, tokenizer):
    narrow = Decoding(sample=True, top_p=1e-6)
    cold = Decoding(sample=True, temperature=1e-6)
    assert answers(model, tokenizer, decoding=narrow) == answers(model, tokenizer)
    assert answers(model, tokenizer, decoding=cold) == answers(model, tokenizer)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_ngram_rule_is_that_of_transformers_where_nothing_is_padded(size):
    generator = torch.Generator().manual_seed(size)
    for length in (size - 1, size, 12, 40):
        ids = torch.randint(0, 4, (5, length), generator=generator)
        scores = torch.rand(5, 4, generator=generator)
        ours = NoRepeatNgram(size, torch.ones_like(ids))(ids, scores)
        assert torch.equal(ours, NoRepeatNGramLogitsProcessor(size)(ids, scores))


def test_padding_is_no_part_of_an_ngram():
    ids = torch.tensor([[7, 7, 1, 2, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    allowed = NoRepeatNgram(2, mask)(ids, torch.zeros(1, 8))
    assert allowed.isfinite().all()  # read as text, the padding says that 7 and 1 follow a 7


@pytest.mark.parametrize("decoding", [Decoding(no_repeat_ngram_size=2), Decoding(sample=True, no_repeat_ngram_size=1)])
def test_no_ngram_of_prompt_and_answer_is_repeated(model, tokenizer, decoding):
    size = decoding.no_repeat_ngram_size
    new = 24
    texts = answers(model, tokenizer, decoding=decoding, max_new_tokens=new)
    assert texts == answers(model, tokenizer, decoding=decoding, max_new_tokens=new, batch=1)
    for prompt, ids in zip(PROMPTS, continued_ids(model, tokenizer, decoding, new), strict=True):
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        answered = grams[start:]
        assert len(set(answered)) == len(answered)
        assert not set(answered) & set(grams[:start])


def continued_ids(model, tokenizer, decoding, new: int) -> list[list[int]]:
    """Prompt and answer as token ids, seen through a tokenizer that decodes to numbers."""

    class Numbers(PreTrainedTokenizerFast):
        def decode(self, token_ids, **_):
            return " ".join(map(str, token_ids))

    numbers = Numbers(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    texts = answers(model, numbers, decoding=decoding, max_new_tokens=new)
    prompts = tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]
    return [p + [int(i) for i in text.split()] for p, text in zip(prompts, texts, strict=True)]


def test_prompts_keep_their_first_tokens(model, tokenizer):
    long = PROMPTS[2]
    first = tokenizer(long, add_special_tokens=False)["input_ids"][:5]
    assert answers(model, tokenizer, [long], max_prompt_length=5) == [greedy_by_hand(model, tokenizer, first, 12)]


def test_special_tokens_are_added_on_request(model, tokenizer):
    ids = tokenizer(PROMPTS[0], add_special_tokens=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    wanted = greedy_by_hand(model, tokenizer, ids, 12)
    assert answers(model, tokenizer, PROMPTS[:1], add_special_tokens=True) == [wanted]


def test_a_special_token_that_closes_a_prompt_is_left_out(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    closing = trained_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    assert answers(model, closing, add_special_tokens=True) == answers(model, tokenizer)


def test_no_prompts_give_no_answers(model, tokenizer):
    assert answers(model, tokenizer, []) == []


def test_an_empty_prompt_is_answered(model, tokenizer):
    wanted = greedy_by_hand(model, tokenizer, [tokenizer.bos_token_id], 12)
    assert answers(model, tokenizer, ["", *PROMPTS])[0] == wanted


def test_an_answer_ends_at_the_end_token_and_shows_no_special_token(tokenizer):
    model = tiny_model("gpt2", len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[tokenizer.eos_token_id] = 10
    assert answers(model, tokenizer) == [""] * len(PROMPTS)


def test_rows_of_a_head_beyond_the_vocabulary_are_never_chosen(tokenizer):
    model = tiny_model("gpt2", len(tokenizer) + 5)
    narrow = tiny_model("gpt2", len(tokenizer))
    wide_state = model.state_dict()
    for name, value in narrow.state_dict().items():
        wide_state[name][: len(value)] = value
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 100 * model.lm_head.weight[:5]
    assert answers(model, tokenizer) == answers(narrow, tokenizer)


def test_the_models_own_generation_configuration_does_not_leak_in_and_is_put_back(model, tokenizer):
    plain = answers(model, tokenizer)
    kept = model.generation_config
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, min_new_tokens=3, max_length=3
    )
    model.generation_config = own
    try:
        assert answers(model, tokenizer) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = kept


def test_dropout_is_off_and_every_module_gets_its_mode_back(model, tokenizer):
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    frozen.eval()
    before = [module.training for module in model.modules()]
    first = answers(model, tokenizer)
    assert answers(model, tokenizer) == first
    assert [module.training for module in model.modules()] == before
    model.eval()


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(sample=True, temperature=0.9, top_p=0.9, no_repeat_ngram_size=6)]
)
def test_nothing_is_said_on_screen(model, decoding, transformers_log, capfd):
    fresh = trained_tokenizer()  # one that has not warned yet
    answers(model, fresh, decoding=decoding)
    assert transformers_log == []
    assert capfd.readouterr() == ("", "")


def test_progress_tells_the_prompts_that_are_done(model, tokenizer):
    told: list[int] = []
    answers(model, tokenizer, on_batch=told.append)
    assert told == [4, 6]


def test_too_few_positions_are_refused_in_one_line(model, tokenizer):
    with pytest.raises(ModelError, match=r"evaluation\.max_new_tokens: 90 .* the 96 positions"):
        answers(model, tokenizer, max_new_tokens=90)
    with pytest.raises(ModelError, match="a prompt of 64"):
        require_positions(model.config, 64, 33)
    require_positions(model.config, 64, 32)


def answer_a_share(rank: int, store: str, folder: str) -> None:
    """Rank 0 brings five prompts in batches of two, rank 1 one, rank 2 none."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    tokenizer = trained_tokenizer()
    share = [PROMPTS[:5], PROMPTS[5:], []][rank]
    texts = answers(tiny_model("llama", len(tokenizer)), tokenizer, share, decoding=SAMPLE, batch=2, synced=True)
    torch.save(texts, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_different_numbers_of_prompts_finish_together_with_the_same_answers(tmp_path, tokenizer):
    multiprocessing.spawn(answer_a_share, (str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [len(s) for s in shares] == [5, 1, 0]
    alone = answers(tiny_model("llama", len(tokenizer)), tokenizer, decoding=SAMPLE)
    assert [*shares[0], *shares[1]] == alone
