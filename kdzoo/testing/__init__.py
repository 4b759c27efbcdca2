"""For plugin authors: feed arrays into a loss, through the same pass as training."""

from kdzoo.testing.replay import Recorded, Replay, replay

__all__ = ["Recorded", "Replay", "replay"]
