"""The kinds of plugin. A new one is a file in `kdzoo/api` and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from kdzoo.api.aligner import Aligner
from kdzoo.api.fusion import Fusion
from kdzoo.api.loss import Loss
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.plugin import Plugin
from kdzoo.api.token_weights import TokenWeights
from kdzoo.api.tracker import Tracker

_LISTED = (Loss, TokenWeights, Aligner, Fusion, ModelAdapter, Tracker)

KINDS: Mapping[str, type[Plugin]] = {kind.kind: kind for kind in _LISTED}
"""By the name that messages, declarations and the registry know them by, in the order of their listing."""
