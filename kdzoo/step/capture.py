"""One forward pass of one model, keeping the sites that somebody declared, packed to the scored rows.

Sites: `hidden.last` (after the final norm: what the head reads), `hidden.<k>` (output of block k), `embed.input` and
`embed.target` (table rows of the token at, and the token predicted by, each row), `embed.zero` (table row of token 0,
[1, width]) and, with `@all`, a hidden site at every position, prompt and padding included ([B * T, width]).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from kdzoo.errors import KdzooError
from kdzoo.plugin.contracts import Anatomy
from kdzoo.step.batch import Side


def capture(model: nn.Module, anatomy: Anatomy, side: Side, sites: Iterable[str]) -> dict[str, Tensor]:
    """Run the model's backbone (never its head) on `side` and return every site asked for."""
    wanted = sorted(set(sites))
    blocks = {block for site in wanted if (block := _block_of(site)) is not None}
    kept: dict[int, Tensor] = {}

    def keep(index: int, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # With gradient checkpointing the hook fires again in the backward pass: the first output is the one in use.
        kept.setdefault(index, output if isinstance(output, Tensor) else output[0])

    modules = anatomy.blocks(model) if blocks else nn.ModuleList()
    for index in blocks:
        if not -len(modules) <= index < len(modules):
            raise KdzooError(f"site 'hidden.{index}': the model has {len(modules)} blocks, counted from 0")
    handles = [modules[index].register_forward_hook(partial(keep, index)) for index in blocks]
    try:
        last = anatomy.backbone(model)(
            input_ids=side.input_ids, attention_mask=side.attention_mask, use_cache=False
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()

    found: dict[str, Tensor] = {}
    for site in wanted:
        name, _, everywhere = site.partition("@")
        if name.startswith("hidden."):
            block = _block_of(site)
            every = (last if block is None else kept[block]).flatten(0, 1)
            found[site] = every if everywhere else every[side.rows]
        elif name in ("embed.input", "embed.target", "embed.zero"):
            ids = {"embed.input": side.inputs, "embed.target": side.labels, "embed.zero": side.rows.new_zeros(1)}
            found[site] = anatomy.embedding(model)(ids[name]) / anatomy.embed_scale(model)
        else:
            raise KdzooError(
                f"site '{site}': no such site; there are hidden.last, hidden.<block>, embed.input, embed.target"
            )
    return found


def _block_of(site: str) -> int | None:
    name = site.partition("@")[0].removeprefix("hidden.")
    return int(name) if name.lstrip("-").isdigit() else None
