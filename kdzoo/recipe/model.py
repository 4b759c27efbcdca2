"""The recipe as typed, frozen data. Its JSON Schema is generated from here and from the installed plugins.

No torch in this room. Field docstrings are the documentation of the keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Lora(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021, through peft): they are trained, and the model's own weights stay."""

    rank: int = Field(default=8, ge=1)
    """The width between the two trained matrices of a module."""
    alpha: float | None = Field(default=None, gt=0)
    """What an adapter adds is multiplied by `alpha / rank`. Default: the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of an adapted module's input that its adapter does not see while it is trained."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of modules, or ends of names; `all-linear`: every linear module but the head, which has none."""
    export: Literal["merged", "adapter"] = "merged"
    """What the run leaves: a plain model, or peft's adapter folder (student only)."""


class Adapter(Section):
    """A LoRA adapter that was trained before."""

    name: str
    """A Hugging Face name or a local folder with `adapter_config.json` and `adapter_model.safetensors`."""
    revision: str | None = None
    """The revision of a Hugging Face name."""
    merge: bool = True
    """Add it to the model's weights once, in the cache; else it stays beside them (teacher only)."""


class ModelSource(Section):
    """Where a model comes from: exactly one of `name`, `gguf_file`, `gguf_package`, `config`, `layers`."""

    name: str | None = None
    """A Hugging Face name or a local folder with weights, configuration and tokenizer; or an adapter's folder, which
    names the model that it is merged into."""
    revision: str | None = None
    """The revision of a Hugging Face name."""
    gguf_file: str | None = None
    """A GGUF file, converted once to a safetensors folder in the cache."""
    gguf_package: str | None = None
    """An installed Python package that carries a GGUF file in parts and offers `assemble(path)`."""
    config: dict[str, Any] | None = None
    """A Hugging Face configuration (with `model_type`) for a model with random weights; the vocabulary size
    and the special tokens come from the tokenizer."""
    layers: list[int] | None = None
    """The student is cut from its teacher: these blocks, with the teacher's embeddings, norm and head."""
    tokenizer: str | None = None
    """By name or folder, or one of the lab (`lab:bytes`, `lab:words`). Default: the model's own."""
    seed: int = 0
    """The seed of random weights."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, more time (student only)."""
    lora: Lora | None = None
    """Train adapters instead of the weights, in every stage that trains this model. `{}` takes all defaults."""
    adapter: Adapter | None = None
    """An adapter that the model comes with."""


class Fields(Section):
    """What the columns of a data set are called."""

    instruction: str = "instruction"
    input: str = "input"
    """An empty string: there is no such column."""
    response: str = "output"
    """A string, or a list of references (evaluation only)."""


ROW_SOURCES = ("lab", "set", "jsonl", "dataset")


class Source(Section):
    """Rows of instruction data: exactly one of `lab`, `set`, `jsonl`, `dataset`."""

    lab: str | None = None
    """A split of the built-in lab data: `train`, `teacher`, `held_out`, or an evaluation split."""
    set: str | None = None
    """An evaluation set of the literature: `dolly`, `self_instruct`, `vicuna`, `sni` or `unni`, from the folder
    $KDZOO_DATA where it is there, else from the hub; or `unni_short`, from the folder alone."""
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
    """Take the first rows only."""


class Template(Section):
    """How a row becomes a prompt. With `chat`, the tokenizer's own chat template is used."""

    chat: bool = False
    prompt: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    prompt_with_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )


class Data(Section):
    """The rows to train on, and how they become tokens."""

    train: Source
    held_out: Source | None = None
    """Rows that no stage trains on: artefacts report on them."""
    template: Template = Template()
    max_length: int = Field(default=512, ge=8)
    """Tokens of prompt and response together; the response is cut."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Tokens of the prompt: its first ones are kept."""


class Plugged(Section):
    """A plugin by name, with its parameters."""

    use: str
    params: dict[str, Any] = Field(default_factory=dict)


class Ramp(Section):
    """A weight that moves linearly from `start` to `end` over the first `steps` optimizer steps and stays."""

    start: float
    end: float
    steps: int = Field(ge=1)


class LossSlot(Plugged):
    """One term of the loss."""

    weight: float | Ramp = 1.0
    lr: float | None = Field(default=None, gt=0)
    """The peak learning rate of the modules that the loss trains. Default: the stage's."""
    fuse: str | None = None
    """The entry of the recipe's `fuse` whose state this loss, and the artefacts it needs, read as the teacher's last
    state. A teacher without experts has nothing to fuse: its own state is read."""


class Stage(Section):
    """One run of the training loop."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; or say `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    batch: int = Field(default=16, ge=1)
    """Sequences per optimizer step, over all ranks and accumulation: the split does not change the result."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences per forward pass on one rank. Default: `batch` divided by the ranks."""
    lr: float = Field(default=5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    clip: float = Field(default=1.0, ge=0)
    """Global norm at which gradients are clipped; 0 is off."""
    seed: int | None = None
    """The order of the rows and the initialisation of what losses train. Default: the recipe's."""
    data: Source | None = None
    """Rows for this stage alone. Default: `data.train`."""
    losses: dict[str, LossSlot] | None = None
    """The terms of this stage. `distill` uses the recipe's `losses`."""
    use: str | None = None
    """For a stage that makes an artefact: the loss whose module is trained, on the teacher's states alone."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of `use`."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the recipe's `deepspeed` for this stage."""
    gradients_every: int | None = Field(default=20, ge=1)
    """Optimizer steps between two looks at each term's gradient at the student's last state, which cost a product."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints of `distill`, which keeps one at its end in any case."""


class Decoding(Section):
    """How answers are generated."""

    sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seeds: list[int] = Field(default_factory=lambda: [10])
    """One generation per seed; their mean is reported. Greedy decoding runs once."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """This literature uses 6 when it samples."""


class Evaluation(Section):
    """What is scored at the end of a run."""

    sets: dict[str, Source] = Field(default_factory=dict)
    decoding: dict[str, Decoding] = Field(default_factory=lambda: {"greedy": Decoding()})
    max_new_tokens: int = Field(default=128, ge=1)
    batch: int = Field(default=32, ge=1)
    """Prompts per generation batch and rank."""


class Recipe(Section):
    """A run, whole: two models, data, losses, stages, engine."""

    title: str
    """What the run is about: the method. It names the run folder."""
    description: str = ""
    pair: str = ""
    """Which models and data, in words; the recipes under `pairs/` say it."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    plugins: list[str] = Field(default_factory=list)
    """Loose plugin files, relative to the recipe."""
    trackers: list[str] = Field(default_factory=list)
    """Where steps are sent beside the run folder: `tensorboard`, `wandb`, `trackio`, or a plugin's."""
    student: ModelSource
    teacher: ModelSource
    data: Data
    align: Plugged = Plugged(use="by_bytes")
    """The aligner for two tokenizers. One tokenizer needs none."""
    fuse: dict[str, Plugged] = Field(default_factory=dict)
    """Fusions of a mixture-of-experts teacher's experts, by name. A loss reads one that its slot names."""
    losses: dict[str, LossSlot]
    stages: dict[str, Stage]
    """`distill`, and where wanted `teacher` (trained first, cached), `sft` (the student on the data alone, to
    compare with) and one for every artefact that a loss needs."""
    evaluation: Evaluation = Evaluation()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own configuration, verbatim, but for the keys that the recipe owns."""
