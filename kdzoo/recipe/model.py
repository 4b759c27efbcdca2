"""The recipe as typed, frozen data. Its JSON Schema is generated from here and from the installed plugins.

No torch in this room. Field docstrings are the documentation of the keys.
"""

from __future__ import annotations

from collections.abc import ItemsView
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Lora(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021, through peft), which are trained while the model's own weights stay
    frozen."""

    rank: int = Field(default=8, ge=1)
    """The inner width of the two matrices that are trained for each module."""
    alpha: float | None = Field(default=None, gt=0)
    """The output of an adapter is multiplied by `alpha / rank`. Default: the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, in training only."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The names of the adapted modules, or the ends of their names. `all-linear`: every linear module but the head."""
    export: Literal["merged", "adapter"] = "merged"
    """What the run exports: a plain model, or an adapter folder as peft writes it (student only)."""


class Adapter(Section):
    """A trained LoRA adapter."""

    name: str
    """A Hugging Face name or a local folder with `adapter_config.json` and `adapter_model.safetensors`."""
    revision: str | None = None
    """The revision of a Hugging Face name."""
    merge: bool = True
    """Add the adapter to the model's weights once, in the cache. False: keep it apart from them (teacher only)."""


class ModelSource(Section):
    """Where a model comes from: exactly one of `name`, `gguf_file`, `gguf_package`, `config`, `layers`."""

    name: str | None = None
    """A Hugging Face name, or a local folder with weights, configuration and tokenizer. An adapter's folder stands for
    its base model with the adapter merged."""
    revision: str | None = None
    """The revision of a Hugging Face name."""
    gguf_file: str | None = None
    """A GGUF file, converted once to a safetensors folder in the cache."""
    gguf_package: str | None = None
    """An installed Python package that contains a GGUF file in parts and has a function `assemble(path)`."""
    config: dict[str, Any] | None = None
    """A Hugging Face configuration (with `model_type`) for a model with random weights. The vocabulary size and the
    special tokens come from the tokenizer."""
    layers: list[int] | None = None
    """Cut the student from its teacher: these blocks of the teacher, with its embeddings, final norm and head."""
    tokenizer: str | None = None
    """A tokenizer by its name or folder, or one of the lab's (`lab:bytes`, `lab:words`). Default: the model's own."""
    seed: int = 0
    """The seed of random weights."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass, which saves memory and takes more time (student only)."""
    lora: Lora | None = None
    """Train low-rank adapters, not the weights, in every stage that trains this model. `{}` takes all defaults."""
    adapter: Adapter | None = None
    """A trained adapter to load with the model."""


class Fields(Section):
    """The names of the columns of a data set."""

    instruction: str = "instruction"
    """The column with the instruction."""
    input: str = "input"
    """The column with the input. An empty string: the data set has no such column."""
    response: str = "output"
    """The column with the response: a text, or a list of references, of which training reads the first."""


ROW_SOURCES = ("lab", "set", "jsonl", "dataset")


class Source(Section):
    """Rows of instruction data: exactly one of `lab`, `set`, `jsonl`, `dataset`."""

    lab: str | None = None
    """A split of the built-in lab data: `train`, `teacher`, `held_out`, or an evaluation split."""
    set: str | None = None
    """An evaluation set of the literature: `dolly`, `self_instruct`, `vicuna`, `sni` or `unni`, from the folder
    $KDZOO_DATA if it has the set, else from the Hugging Face hub; or `unni_short`, from the folder only."""
    jsonl: str | None = None
    """A JSONL file; `$VARIABLES` are expanded."""
    dataset: str | None = None
    """A data set of the Hugging Face hub, or a folder that `datasets` loads."""
    subset: str | None = None
    """The configuration name of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    fields: Fields = Fields()
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows, from the beginning."""


class Template(Section):
    """How a row becomes a prompt."""

    chat: bool = False
    """Use the tokenizer's own chat template instead of the two prompts."""
    prompt: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    """The prompt of a row without input."""
    prompt_with_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
    """The prompt of a row with input."""


class Data(Section):
    """The rows to train on, and how they become tokens."""

    train: Source
    """The rows of `distill`, and of every stage without rows of its own."""
    held_out: Source | None = None
    """Rows that no stage trains on. Artifacts and students are measured on them."""
    template: Template = Template()
    max_length: int = Field(default=512, ge=8)
    """The most tokens of prompt and response together. A longer response is cut."""
    max_prompt_length: int = Field(default=256, ge=1)
    """The most tokens of the prompt, of which the first ones are kept."""


class Plugged(Section):
    """A plugin by name, with its parameters."""

    use: str
    """The name of the plugin, as `kdzoo list` prints it."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of the plugin."""


class Ramp(Section):
    """A weight that moves linearly from `start` to `end` over the first `steps` optimizer steps, and then stays."""

    start: float
    end: float
    steps: int = Field(ge=1)


class LossSlot(Plugged):
    """One loss of a stage, under a name of your choice."""

    weight: float | Ramp = 1.0
    """The weight of this loss in the sum of all losses: a number, or a ramp."""
    lr: float | None = Field(default=None, gt=0)
    """The peak learning rate of the modules that the loss trains. Default: the stage's."""
    weights: str | None = None
    """The entry of the recipe's `token_weights` that says how much each token counts in this loss. Default: each as
    much."""
    fuse: str | None = None
    """The entry of the recipe's `fuse` whose fused state this loss, and the artifacts that it needs, read as the
    teacher's last state. For a teacher without experts, they read its own state."""


class Stage(Section):
    """One run of the training loop."""

    steps: int | None = Field(default=None, ge=1)
    """The length of the stage in optimizer steps. A stage has either `steps` or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """The length of the stage in passes over the rows, which may be a fraction."""
    batch: int = Field(default=16, ge=1)
    """Sequences per optimizer step, over all ranks and accumulation. How it is split does not change the result."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences per forward pass on one rank. Default: `batch` divided by the ranks."""
    lr: float = Field(default=5e-4, gt=0)
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """The betas of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The weight decay of AdamW, on matrices only."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The learning rate after warm-up: constant, or falling to 0 at the last step."""
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    clip: float = Field(default=1.0, ge=0)
    """The global norm at which gradients are clipped. 0: no clipping."""
    seed: int | None = None
    """The seed of the order of the rows, and of the initial values of what losses train. Default: the recipe's."""
    data: Source | None = None
    """The rows of this stage. Default: `data.train`."""
    losses: dict[str, LossSlot] | None = None
    """The losses of this stage. `distill` trains the recipe's `losses`."""
    use: str | None = None
    """Of a stage that makes an artifact: the loss whose module is trained, on states of the teacher only."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of `use`."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the recipe's `deepspeed` for this stage."""
    balance: Literal["gradient", "pcgrad"] | None = None
    """How the weights of losses follow their gradients at the student's last state, which are measured every
    `gradients_every` steps. "gradient": so that the norms of the gradients are in proportion to the weights. "pcgrad":
    so that what a gradient has against another one is taken off it. Default: weights are as they are given."""
    gradients_every: int | None = Field(default=20, ge=1)
    """Optimizer steps between measurements of each loss's gradient at the student's last state. Each measurement costs
    one product with the student's head per loss."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints of `distill`, which also writes one at its end."""


class Decoding(Section):
    """How answers are generated."""

    sample: bool = False
    """Draw tokens at random. False: greedy decoding, which takes the likeliest token."""
    temperature: float = Field(default=1.0, gt=0)
    """The logits are divided by it when tokens are drawn."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest ones that have this probability together."""
    seeds: list[int] = Field(default_factory=lambda: [10], min_length=1)
    """One generation per sampling seed; their mean is reported. Greedy decoding runs once."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No n-gram of this length occurs twice in prompt and answer. 0: no limit. The literature samples with 6."""


class Answers(Section):
    """The teacher's own answers to the prompts of `distill`, which take the place of responses of the data."""

    share: float = Field(default=1.0, gt=0, le=1)
    """The share of the rows of `distill` whose response is the teacher's answer. The other rows keep the data's."""
    seed: int = 0
    """The seed of the order in which rows are taken for the share. A larger share keeps the rows of a smaller one."""
    decoding: Decoding = Decoding()
    """How answers are generated: one by greedy decoding, or one per sampling seed, of which the best one is kept."""
    score: Literal["sum_logprob", "mean_logprob"] = "sum_logprob"
    """What is largest of the best answer: the teacher's own log-likelihood of its tokens at temperature 1, summed, or
    in the mean, which does not prefer short answers."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """The most tokens of an answer. An answer that is cut there is taught without an end. Default: the evaluation's."""
    batch: int | None = Field(default=None, ge=1)
    """Prompts per generation batch and rank. Default: the evaluation's."""


class Stages(Section):
    """Every stage by its name: those that train something, as a mapping, and `answers`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Stage] = Field(init=False)

    answers: Answers | None = None
    """Generates the teacher's answers, which rows of `distill` then have as their responses."""

    def __getitem__(self, name: str) -> Stage:
        return self.__pydantic_extra__[name]

    def __contains__(self, name: str) -> bool:
        return name in self.__pydantic_extra__

    def get(self, name: str) -> Stage | None:
        return self.__pydantic_extra__.get(name)

    def items(self) -> ItemsView[str, Stage]:
        return self.__pydantic_extra__.items()


class Evaluation(Section):
    """What is scored at the end of a run."""

    sets: dict[str, Source] = Field(default_factory=dict)
    """The evaluation sets, by name."""
    decoding: dict[str, Decoding] = Field(default_factory=lambda: {"greedy": Decoding()})
    """The ways to generate answers, by name."""
    max_new_tokens: int = Field(default=128, ge=1)
    """The most tokens of an answer."""
    batch: int = Field(default=32, ge=1)
    """Prompts per generation batch and rank."""


class Recipe(Section):
    """A whole run: two models, data, losses, stages, evaluation and engine."""

    title: str
    """The name of the method. The run folder is named after it."""
    description: str = ""
    """A text for readers."""
    pair: str = ""
    """A text that names the models and the data; the recipes under `pairs/` set it."""
    seed: int = 0
    """The seed of every stage without a seed of its own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` is mixed precision: models in bfloat16, logits, losses and optimizer states in float32."""
    plugins: list[str] = Field(default_factory=list)
    """Loose plugin files, relative to the recipe."""
    trackers: list[str] = Field(default_factory=list)
    """The trackers that every step is sent to: `tensorboard`, `wandb`, `trackio`, or a tracker of your own."""
    student: ModelSource
    """The model that learns."""
    teacher: ModelSource
    """The model that the student learns from."""
    data: Data
    align: Plugged = Plugged(use="by_bytes")
    """The aligner for models with two tokenizers. Models with one tokenizer need none."""
    fuse: dict[str, Plugged] = Field(default_factory=dict)
    """Fusions of the experts of a mixture-of-experts teacher, by name. A loss names the one that it reads."""
    token_weights: dict[str, Plugged] = Field(default_factory=dict)
    """How much each token of a response counts, by names of your choice. A loss names the one that it is weighed by."""
    losses: dict[str, LossSlot]
    """The losses of the stage `distill`, by names of your choice."""
    stages: Stages
    """`distill`; optionally `teacher` (trains the teacher first), `sft` (trains a student on the data alone, as a
    baseline) and `answers` (generates the teacher's answers); and a stage for every artifact that a loss needs."""
    evaluation: Evaluation = Evaluation()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own configuration, without the keys that the recipe sets."""
