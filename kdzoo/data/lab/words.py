"""The words that lab rows are made of, and words of the same kinds that training never shows."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Verb:
    base: str
    present: str
    past: str
    participle: str


@dataclass(frozen=True)
class Words:
    names: tuple[str, ...]
    animals: tuple[str, ...]
    fruits: tuple[str, ...]
    colours: tuple[str, ...]
    objects: tuple[str, ...]
    places: tuple[str, ...]
    jobs: tuple[str, ...]
    drinks: tuple[str, ...]
    verbs: tuple[Verb, ...]

    def among(self, other: Words) -> Words:
        """These words among as many or more of another's."""
        mixed = {field.name: getattr(self, field.name) + getattr(other, field.name)[::2] for field in fields(self)}
        return Words(**mixed)

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The kinds of things that lists are made of, by the plural that names them."""
        return {
            "animals": self.animals,
            "fruits": self.fruits,
            "colours": self.colours,
            "objects": self.objects,
        }

    @property
    def things(self) -> tuple[str, ...]:
        return self.animals + self.fruits + self.colours + self.objects


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(word for line in lines for word in line.split())


def _verbs(*lines: str) -> tuple[Verb, ...]:
    return tuple(Verb(*forms.split("/")) for forms in _words(*lines))


SEEN = Words(
    names=_words(
        "Ana Ben Cara Dan Ella Finn Gina Hugo Ida Jack Kate Leo Mia Nora Omar Paul Rosa Sam Tina Uma",
        "Vera Will Zoe Adam Bella Carl Dora Emil Fay Greg Hana Ivan June Karl Lena Max Nina Otto Pia Rob",
    ),
    animals=_words("cat dog fox owl bear wolf goat lion crab duck horse mouse tiger zebra camel rabbit"),
    fruits=_words("apple pear plum fig lemon mango peach cherry banana orange"),
    colours=_words("red blue green white black brown pink grey"),
    objects=_words(
        "key lamp bell rope book coin drum flag hat kettle",
        "map pen ring shoe spoon table basket clock mirror bucket",
    ),
    places=_words("park market school garden kitchen station harbour library forest office tower cellar bridge museum"),
    jobs=_words("baker doctor farmer teacher driver singer painter nurse pilot cook sailor writer"),
    drinks=_words("tea coffee milk juice water soup"),
    verbs=_verbs(
        "clean/cleans/cleaned/cleaned paint/paints/painted/painted open/opens/opened/opened",
        "find/finds/found/found take/takes/took/taken see/sees/saw/seen buy/buys/bought/bought",
        "sell/sells/sold/sold move/moves/moved/moved wash/washes/washed/washed hold/holds/held/held",
        "drop/drops/dropped/dropped hide/hides/hid/hidden lose/loses/lost/lost",
    ),
)

UNSEEN = Words(
    names=_words("Amir Cleo Edith Felix Heidi Jonas Maud Oscar Ruth Theo"),
    animals=_words("hen seal otter sheep donkey monkey"),
    fruits=_words("grape melon quince apricot"),
    colours=_words("gold purple yellow violet"),
    objects=_words("axe broom comb glove ladder candle needle hammer"),
    places=_words("beach castle temple hotel bakery stadium"),
    jobs=_words("miner tailor dentist lawyer"),
    drinks=_words("cocoa cider lemonade"),
    verbs=_verbs(
        "lift/lifts/lifted/lifted carry/carries/carried/carried",
        "bring/brings/brought/brought mend/mends/mended/mended",
    ),
)
