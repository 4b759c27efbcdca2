"""The contract reaches beyond divergences on logits: losses of other shapes keep every promise of `kdzoo check`."""

from __future__ import annotations

import pytest
from sketches import SKETCHES

from kdzoo.testing import check_loss


@pytest.mark.parametrize("loss", SKETCHES, ids=lambda loss: loss.name)
def test_it_keeps_every_promise(loss):
    check_loss(loss, ranks=False)
