"""For plugin authors: feed arrays into a loss through the same pass as training, and hold it to what losses promise."""

from kdzoo.testing.promises import check_loss, conformance
from kdzoo.testing.replay import Recorded, Replay, replay

__all__ = ["Recorded", "Replay", "check_loss", "conformance", "replay"]
