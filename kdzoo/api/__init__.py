"""All that a plugin sees: one file per kind of plugin, and what these are written in. No other room is imported here.

The public names: a plugin imports them from `kdzoo`.
"""

from kdzoo.api import ops
from kdzoo.api.aligner import Aligner, Alignment, Tokens
from kdzoo.api.batch import Batch, Reduction, Side
from kdzoo.api.chunk import Logits
from kdzoo.api.fusion import Experts, Fusion, FusionParams
from kdzoo.api.head import Head
from kdzoo.api.hooks import hookimpl
from kdzoo.api.loss import Loss, Needs, Stream, visit
from kdzoo.api.model_adapter import Attention, Mixture, ModelAdapter, Projection
from kdzoo.api.models import Heads, ModelInfo, ModelPair, Role, Vocabulary
from kdzoo.api.plugin import NoParams, Params, Register
from kdzoo.api.step import Step
from kdzoo.api.terms import Terms
from kdzoo.api.token_weights import TokenNeeds, TokenWeights, TokenWeightsParams, WeighedTokens, Weights
from kdzoo.api.tracker import Tracker
from kdzoo.api.view import View
from kdzoo.errors import DataError, KdzooError, ModelError, PluginError, RecipeError

__all__ = [
    "Aligner",
    "Alignment",
    "Attention",
    "Batch",
    "DataError",
    "Experts",
    "Fusion",
    "FusionParams",
    "Head",
    "Heads",
    "KdzooError",
    "Logits",
    "Loss",
    "Mixture",
    "ModelAdapter",
    "ModelError",
    "ModelInfo",
    "ModelPair",
    "Needs",
    "NoParams",
    "Params",
    "PluginError",
    "Projection",
    "RecipeError",
    "Reduction",
    "Register",
    "Role",
    "Side",
    "Step",
    "Stream",
    "Terms",
    "TokenNeeds",
    "TokenWeights",
    "TokenWeightsParams",
    "Tokens",
    "Tracker",
    "View",
    "Vocabulary",
    "WeighedTokens",
    "Weights",
    "hookimpl",
    "ops",
    "visit",
]
