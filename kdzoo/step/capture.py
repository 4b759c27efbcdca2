"""One forward pass of one model, keeping the sites that somebody declared, packed to the scored tokens.

Sites: `hidden.last` (after the final norm: what the head reads), `hidden.<k>` (output of block k), `embed.input` and
`embed.target` (the table's entry of the token at each position, of the one it predicts), `embed.zero` (of token 0,
[1, width]). Of a block that mixes experts: `experts.<k>` or `experts.last` (every expert's own output, [N, experts,
width]), `router.<k>` (the router's logits, [N, experts]), and `fused.<slot>` (what a fusion makes of them).

Of a block's attention: `query.<k>`, `key.<k>` and `value.<k>` (what its projections make, [N, heads x size]), and
`attention_query.<k>` and `attention_key.<k>` (what attention compares, [N, query heads x size]: normalised and rotated
where the family does, each key once for every query head of its group, and queries times the block's scale, so that
their products head by head are the scores). `last` is the last block.

With `@all`, the same at every position, prompt and padding included ([B * T, ...]); embeddings have no such form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.api.batch import Side
from kdzoo.api.fusion import Experts, Fusion
from kdzoo.api.model_adapter import Attention, Mixture, ModelAdapter, Projection
from kdzoo.errors import KdzooError
from kdzoo.transformers_private import attention_heard

OF_ATTENTION = ("query", "key", "value", "attention_query", "attention_key")
"""Kinds of sites."""
NO_FUSIONS: Mapping[str, Fusion] = MappingProxyType({})


def capture(
    model: nn.Module,
    adapter: ModelAdapter,
    side: Side,
    sites: Iterable[str],
    fusions: Mapping[str, Fusion] = NO_FUSIONS,
) -> dict[str, Tensor]:
    """Run the model's backbone (never its head) on `side` and return every site asked for.

    With a site `fused.<slot>` comes `fused.<slot>/<name>` [N] for everything that its fusion watches.
    """
    wanted = [_Site.of(name) for name in sorted(set(sites))]
    count = len(adapter.blocks(model))
    blocks = {
        site: _place(site.block, count, site.name)
        for site in wanted
        if site.kind == "hidden" and site.block is not None
    }
    mixed = {site: _mixed_block(site, fusions, count) for site in wanted if site.of_experts}
    attended = {
        site: _place(-1 if site.block is None else site.block, count, site.name)
        for site in wanted
        if site.kind in OF_ATTENTION
    }
    outputs: dict[int, Tensor] = {}
    mixtures: dict[int, _Mixed] = {}
    attentions: dict[int, _Attended] = {}
    with ExitStack() as hooks:
        for index in set(blocks.values()):
            handle = adapter.blocks(model)[index].register_forward_hook(partial(_keep_output, outputs, index))
            hooks.callback(handle.remove)
        for index in set(mixed.values()):
            mixture = adapter.mixture(model, index)
            if mixture is None:
                name = next(site.name for site, block in mixed.items() if block == index)
                raise KdzooError(f"site '{name}': block {index} of the model has no experts")
            everywhere = any(site.everywhere for site, block in mixed.items() if block == index)
            mixtures[index] = _Mixed(mixture, None if everywhere else side.positions)
            mixtures[index].listen(hooks)
        for index in set(attended.values()):
            parts = adapter.attention(model, index)
            if parts is None:
                name = next(site.name for site, block in attended.items() if block == index)
                raise KdzooError(f"site '{name}': the model adapter of this family names no attention; add it there")
            attentions[index] = _Attended(parts, {site.kind for site, block in attended.items() if block == index})
            attentions[index].listen(hooks)
        if attentions:
            hooks.enter_context(attention_heard(model, partial(_hear, list(attentions.values()))))
        fused: dict[str, Tensor] = {}
        norm = adapter.norm(model)

        def finish(_module: nn.Module, _args: object) -> None:
            for site, block in mixed.items():
                if site.kind == "fused":
                    positions = None if site.everywhere else side.positions
                    fused[site.name] = mixtures[block].fused(fusions[site.part], norm, positions)

        # Here a sharded norm is whole; called once more after the pass, it would stay so where it is not called again.
        hooks.callback(norm.register_forward_pre_hook(finish).remove)
        last = adapter.backbone(model)(
            input_ids=side.input_ids, attention_mask=side.attention_mask, use_cache=False
        ).last_hidden_state

    found: dict[str, Tensor] = {}
    for site in wanted:
        if site.kind == "hidden":
            every = (outputs[blocks[site]] if site in blocks else last).flatten(0, 1)
            found[site.name] = every if site.everywhere else every[side.positions]
        elif site.kind in OF_ATTENTION:
            every = attentions[attended[site]].site(site.kind)
            found[site.name] = every if site.everywhere else every[side.positions]
        elif site.kind == "embed":
            ids = {"input": side.inputs, "target": side.labels, "zero": side.positions.new_zeros(1)}
            found[site.name] = adapter.embedding(model)(ids[site.part]) / adapter.embed_scale(model)
        else:
            mix, positions = mixtures[mixed[site]], None if site.everywhere else side.positions
            if site.kind == "fused":
                fusion = fusions[site.part]
                found[site.name] = fused[site.name]
                if not site.everywhere:
                    watched = fusion.watch(mix.experts(positions))
                    found |= {f"{site.name}/{name}": value for name, value in watched.items()}
            else:
                experts = mix.experts(positions)
                found[site.name] = experts.outputs if site.kind == "experts" else experts.logits
    return found


def block_of(site: str) -> int | None:
    """The number of the block that a site is of, counted from 0 or from the end; None where its name has none."""
    part = site.partition("@")[0].partition(".")[2]
    return int(part) if part.lstrip("-").isdigit() else None


@dataclass(frozen=True)
class _Site:
    """A site's name, taken apart."""

    name: str
    kind: str  # hidden, embed, experts, router, fused
    part: str
    everywhere: bool

    @classmethod
    def of(cls, name: str) -> _Site:
        base, _, everywhere = name.partition("@")
        kind, _, part = base.partition(".")
        by_block = part == "last" or part.lstrip("-").isdigit()
        known = {
            "hidden": by_block,
            "experts": by_block,
            "router": by_block,
            "embed": part in ("input", "target", "zero") and not everywhere,
            "fused": bool(part),
            **dict.fromkeys(OF_ATTENTION, by_block),
        }
        if not known.get(kind, False) or everywhere not in ("", "all"):
            raise KdzooError(
                f"site '{name}': no such site; there are hidden.last, hidden.<block>, embed.input, embed.target, "
                f"experts.<block>, router.<block>, fused.<slot>, {'.<block>, '.join(OF_ATTENTION)}.<block>"
            )
        return cls(name, kind, part, bool(everywhere))

    @property
    def of_experts(self) -> bool:
        return self.kind in ("experts", "router", "fused")

    @property
    def block(self) -> int | None:
        """As it was written; None for the last state of all."""
        return None if self.part == "last" else int(self.part)


def _mixed_block(site: _Site, fusions: Mapping[str, Fusion], count: int) -> int:
    if site.kind == "fused" and site.part not in fusions:
        raise KdzooError(f"site '{site.name}': the recipe's 'fuse' has no '{site.part}'")
    named = fusions[site.part].params.layer if site.kind == "fused" else site.block
    return _place(-1 if named is None else named, count, site.name)


def _place(block: int, count: int, name: str) -> int:
    """A block counted from 0."""
    if not -count <= block < count:
        raise KdzooError(f"site '{name}': the model has {count} blocks, counted from 0")
    return block % count


def _keep_output(
    outputs: dict[int, Tensor], index: int, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]
) -> None:
    # With gradient checkpointing the hook fires again in the backward pass: the first output is the one in use.
    outputs.setdefault(index, output if isinstance(output, Tensor) else output[0])


class _Attended:
    """The attention of one block while the model runs: only what passes by is kept, so that nothing is computed inside
    the block, which gradient checkpointing runs again without us."""

    def __init__(self, parts: Attention, kinds: Set[str]) -> None:
        self.parts = parts
        self._kinds = kinds
        self._projected: dict[nn.Module, Tensor] = {}
        self._compared: tuple[Tensor, Tensor, float] | None = None

    @property
    def _projections(self) -> dict[str, Projection]:
        return {"query": self.parts.query, "key": self.parts.key, "value": self.parts.value}

    def listen(self, hooks: ExitStack) -> None:
        for module in {self._projections[kind].module for kind in self._kinds & self._projections.keys()}:
            hooks.callback(module.register_forward_hook(self._keep).remove)

    def _keep(self, module: nn.Module, _args: object, output: Tensor) -> None:
        self._projected.setdefault(module, output)

    def hear(self, query: Tensor, key: Tensor, given: Mapping[str, Any]) -> None:
        """`query` [B, heads, T, size], `key` [B, key/value heads, T, size] as attention compares them."""
        window = given.get("sliding_window")
        if self._kinds & {"attention_query", "attention_key"} and window is not None and query.shape[2] > window:
            raise KdzooError(
                f"site 'attention_query': a block of the model sees a window of {window} tokens, and a sequence has "
                f"{query.shape[2]}; set data.max_length to {window}, or name a block that sees all"
            )
        scale = given.get("scaling")
        self._compared = query, key, query.shape[-1] ** -0.5 if scale is None else float(scale)

    def site(self, kind: str) -> Tensor:
        """[B * T, width]"""
        if kind in self._projections:
            projection = self._projections[kind]
            return projection.of(self._projected[projection.module]).flatten(0, 1)
        assert self._compared is not None, "the block has not called the attention function"
        query, key, scale = self._compared
        heads = self.parts.heads
        found = query * scale if kind == "attention_query" else key.repeat_interleave(heads.query // heads.key_value, 1)
        return found.transpose(1, 2).flatten(2).flatten(0, 1)


def _hear(
    listening: Sequence[_Attended], module: nn.Module, query: Tensor, key: Tensor, given: Mapping[str, Any]
) -> None:
    for attended in listening:
        if attended.parts.module is module:
            attended.hear(query, key, given)


class _Mixed:
    """One block of experts while the model runs: all of them, on `positions` of [B * T] (None: on every position).

    A sharded module is whole only while it runs, and the engine expects modules in the same order at every pass: so
    experts run inside the model's own call of them, by their `forward`, which the engine does not see.
    """

    def __init__(self, mixture: Mixture, positions: Tensor | None) -> None:
        self._mixture = mixture
        self._positions = positions
        self._stream: Tensor | None = None
        self._input: Tensor | None = None
        self._routing: tuple[Tensor, Tensor, Tensor] | None = None
        self._experts: Experts | None = None
        self._shared: Tensor | None = None

    def listen(self, hooks: ExitStack) -> None:
        mixture = self._mixture
        for handle in (
            mixture.norm.register_forward_pre_hook(self._keep_stream),
            mixture.block.register_forward_pre_hook(self._keep_input),
            mixture.router.register_forward_hook(self._keep_routing),
            mixture.experts.register_forward_pre_hook(self._run_experts),
        ):
            hooks.callback(handle.remove)

    def _keep_stream(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._stream = self._cut(args[0].flatten(0, 1))

    def _keep_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._input = self._cut(args[0].flatten(0, 1))
        self._shared = None if self._mixture.shared is None else self._mixture.shared(self._input)

    def _keep_routing(self, _module: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, weights, routed = output
        self._routing = self._cut(logits), self._cut(weights), self._cut(routed)

    def _run_experts(self, module: nn.Module, _args: object) -> None:
        assert self._input is not None and self._routing is not None
        logits, weights, routed = self._routing
        dense = torch.zeros_like(logits, dtype=weights.dtype).scatter(1, routed, weights)
        self._experts = Experts(_every_expert(module, self._input, logits.shape[-1]), logits, dense)

    def _cut(self, flat: Tensor) -> Tensor:
        return flat if self._positions is None else flat[self._positions]

    def _at(self, positions: Tensor | None) -> Any:
        """The index of `positions` into what was kept."""
        return positions if self._positions is None and positions is not None else slice(None)

    def experts(self, positions: Tensor | None) -> Experts:
        assert self._experts is not None
        at = self._at(positions)
        return Experts(self._experts.outputs[at], self._experts.logits[at], self._experts.weights[at])

    def fused(self, fusion: Fusion, norm: nn.Module, positions: Tensor | None) -> Tensor:
        """The state [n, D] that the fused output leads to."""
        state = fusion.fuse(self.experts(positions))
        if fusion.params.into == "alone":
            return state
        assert self._stream is not None
        at = self._at(positions)
        if self._shared is not None:
            state = state + self._shared[at]
        return norm.forward(self._stream[at] + state)


def _every_expert(experts: nn.Module, x: Tensor, count: int) -> Tensor:
    """Every expert's output [n, E, D], routed to or not, on states x [n, D]."""
    n, width = x.shape
    # One call with E copies of the states, the m-th of them sent to expert m with weight 1.
    which = torch.arange(count, device=x.device).repeat_interleave(n)[:, None]
    ones = torch.ones_like(which, dtype=x.dtype)
    return experts.forward(x.repeat(count, 1), which, ones).view(count, n, width).transpose(0, 1)
