"""The tasks of the lab: what is asked, and how it may be answered.

A task draws the slots of one instance; its questions and answers are texts with `{slots}` and `[one|another]`
alternatives. A question without `{shown}` puts the shown text into the row's input.

No answer repeats the shown text or a long run of it: a copy of the input would score a Rouge-L that says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdzoo.data.lab.draw import Draw
from kdzoo.data.lab.words import Words

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

Slots = dict[str, str]

ENDINGS = (".", "!", "")
"""How an answer that is no question may end."""


@dataclass(frozen=True)
class World:
    """What the instances of a split are drawn from."""

    words: Words
    items: tuple[int, int]
    """Fewest and most items of a list."""
    facts: tuple[int, int]
    """Fewest and most sentences of a passage."""
    new_questions: bool = False


@dataclass(frozen=True)
class Task:
    name: str
    draw: Callable[[Draw, World], Slots]
    questions: tuple[str, ...]
    new_questions: tuple[str, ...]
    """Phrasings that no training split shows."""
    answers: tuple[str, ...]


def listed(draw: Draw, items: Sequence[str]) -> str:
    """The items in one of several styles, as people write lists."""
    comma = draw.one([", ", ", ", "; ", " - "])
    if len(items) > 1 and draw.below(2):
        return f"{comma.join(items[:-1])} and {items[-1]}"
    return comma.join(items)


def named(draw: Draw, word: str) -> str:
    """A word that is spoken about, sometimes in quotation marks."""
    return draw.one([word, f'"{word}"'])


def _some_things(draw: Draw, world: World) -> list[str]:
    return draw.some(world.words.things, draw.between(*world.items))


def sort_words(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    return {"shown": ", ".join(items), "first": named(draw, min(items)), "last": named(draw, max(items))}


def sort_numbers(draw: Draw, world: World) -> Slots:
    numbers = draw.some(range(len(NUMBERS)), draw.between(*world.items))
    down = bool(draw.below(2))
    return {
        "shown": ", ".join(map(str, numbers)),
        "order": "largest to smallest" if down else "smallest to largest",
        "result": listed(draw, [NUMBERS[number] for number in sorted(numbers, reverse=down)]),
    }


def reverse(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    return {"shown": ", ".join(items), "result": listed(draw, items[::-1])}


def drop_word(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    gone = draw.one(items)
    left = [item for item in items if item != gone]
    return {
        "shown": ", ".join(items),
        "word": gone,
        "first": named(draw, left[0]),
        "last": named(draw, left[-1]),
        "count": NUMBERS[len(left)],
    }


def replace_word(draw: Draw, world: World) -> Slots:
    *items, new = draw.some(world.words.things, draw.between(*world.items) + 1)
    place = draw.below(len(items))
    return {"shown": ", ".join(items), "word": items[place], "new": new, "place": ORDINALS[place]}


def nth_word(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    place = draw.below(len(items))
    return {"shown": ", ".join(items), "place": ORDINALS[place], "result": named(draw, items[place])}


def longest_word(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    while [len(item) for item in items].count(max(map(len, items))) > 1:
        items = _some_things(draw, world)
    longest = max(items, key=len)
    return {"shown": ", ".join(items), "result": named(draw, longest), "letters": NUMBERS[len(longest)]}


def count_word(draw: Draw, world: World) -> Slots:
    low, high = world.items
    counted, *others = draw.some(world.words.things, 3)
    items = [draw.one([counted, counted, *others]) for _ in range(draw.between(low, high) + 1)]
    count = items.count(counted)
    return {
        "shown": ", ".join(items),
        "word": counted,
        "times": "once" if count == 1 else f"{NUMBERS[count]} times",
        "total": NUMBERS[len(items)],
    }


def pick_kind(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    present = [kind for kind, members in world.words.kinds.items() if any(item in members for item in items)]
    kind = draw.one(present)
    picked = [item for item in items if item in world.words.kinds[kind]]
    return {"shown": ", ".join(items), "kind": kind, "result": listed(draw, picked[::-1])}


def next_number(draw: Draw, world: World) -> Slots:
    start, stride, length = draw.between(1, 30), draw.between(1, 9), draw.between(*world.items)
    numbers = [start + stride * place for place in range(length + 1)]
    return {
        "shown": ", ".join(map(str, numbers[:-1])),
        "result": named(draw, str(numbers[-1])),
        "stride": NUMBERS[stride],
    }


def add_up(draw: Draw, world: World) -> Slots:
    who, giver = draw.some(world.words.names, 2)
    first, second = draw.between(2, 9), draw.between(1, 9)
    what = draw.one(world.words.objects)
    more = bool(draw.below(2)) or second > first - 2  # two at least are left: "{what}" is a plural
    second_text = f"{giver} gives {who} {NUMBERS[second]} more" if more else f"{who} gives {NUMBERS[second]} to {giver}"
    return {
        "shown": f"{who} has {NUMBERS[first]} {what}s. {second_text}.",
        "who": who,
        "what": f"{what}s",
        "result": NUMBERS[first + second if more else first - second],
    }


def where_is(draw: Draw, world: World) -> Slots:
    count = draw.between(*world.facts)
    whos, whats = draw.some(world.words.names, count), draw.some(world.words.objects, count)
    places = draw.some(world.words.places, count)
    asked = draw.below(count)
    facts = [
        f"{who} {draw.one(['left', 'put', 'hid'])} the {what} in the {place}"
        for who, what, place in zip(whos, whats, places, strict=True)
    ]
    return {
        "shown": ". ".join(facts) + ".",
        "what": whats[asked],
        "place": places[asked],
    }


def who_likes(draw: Draw, world: World) -> Slots:
    count = draw.between(*world.facts)
    whos, whats = draw.some(world.words.names, count), draw.some(world.words.animals, count)
    asked = draw.below(count)
    facts = [f"{who} {draw.one(['likes', 'owns', 'feeds'])} the {what}" for who, what in zip(whos, whats, strict=True)]
    return {
        "shown": ". ".join(facts) + ".",
        "who": whos[asked],
        "what": whats[asked],
        "does": facts[asked].split()[1],
    }


def when_goes(draw: Draw, world: World) -> Slots:
    count = draw.between(*world.facts)
    whos, places = draw.some(world.words.names, count), draw.some(world.words.places, count)
    days = draw.some(DAYS, min(count, len(DAYS)))
    asked = draw.below(len(days))
    facts = [f"On {day} {who} goes to the {place}" for who, place, day in zip(whos, places, days, strict=False)]
    return {"shown": ". ".join(facts) + ".", "who": whos[asked], "place": places[asked], "day": days[asked]}


def describe(draw: Draw, world: World) -> Slots:
    words = world.words
    attributes = {
        "name": draw.one(words.names),
        "job": draw.one(words.jobs),
        "place": draw.one(words.places),
        "drink": draw.one(words.drinks),
    }
    shown = draw.some([f"{key}: {value}" for key, value in attributes.items()], len(attributes))
    return {"shown": "; ".join(shown), **attributes}


def change_tense(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb = draw.one(words.names), draw.one(words.verbs)
    rest = f"the {draw.one(words.colours)} {draw.one(words.objects)} in the {draw.one(words.places)}"
    past = bool(draw.below(2))
    return {
        "shown": f"{who} {verb.present} {rest}.",
        "who": who,
        "tense": "past" if past else "future",
        "does": verb.past if past else f"will {verb.base}",
        "is": "was" if past else "will be",
        "when": "yesterday" if past else "tomorrow",
    }


def negate(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb, what = draw.one(words.names), draw.one(words.verbs), draw.one(words.objects)
    shown = f"{who} {verb.present} the {what} near the {draw.one(words.places)}."
    return {"shown": shown, "who": who, "verb": verb.base, "done": verb.participle, "what": what}


def be_polite(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb, what = draw.one(words.names), draw.one(words.verbs).base, draw.one(words.objects)
    shown = f"{verb.capitalize()} the {draw.one(words.colours)} {what}, {who}!"
    return {"shown": shown, "who": who, "verb": verb, "what": what}


def make_plural(draw: Draw, world: World) -> Slots:
    words = world.words
    colour, what, place = draw.one(words.colours), draw.one(words.objects), draw.one(words.places)
    return {
        "shown": f"one {colour} {what} in the {place}",
        "many": NUMBERS[draw.between(2, 9)],
        "colour": colour,
        "what": f"{what}s",
        "place": place,
    }


def compare_ages(draw: Draw, world: World) -> Slots:
    first, second = draw.some(world.words.names, 2)
    ages = draw.some(range(10, 70), 2)
    older, younger = (first, second) if ages[0] > ages[1] else (second, first)
    return {"shown": f"{first} is {ages[0]}. {second} is {ages[1]}.", "older": older, "younger": younger}


def join_facts(draw: Draw, world: World) -> Slots:
    first, second = draw.some(world.words.names, 2)
    what = draw.one(world.words.drinks)
    place = draw.one(world.words.places)
    return {
        "shown": f"{first} drinks {what} in the {place}. {second} drinks {what} in the {place}.",
        "first": first,
        "second": second,
        "what": what,
        "place": place,
    }


def swap_ends(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    return {"shown": ", ".join(items), "first": named(draw, items[0]), "last": named(draw, items[-1])}


def make_passive(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb, what = draw.one(words.names), draw.one(words.verbs), draw.one(words.objects)
    place = draw.one(words.places)
    return {
        "shown": f"{who} {verb.present} the {what} in the {place}.",
        "who": who,
        "what": what,
        "done": verb.participle,
        "place": place,
    }


def turn_gift(draw: Draw, world: World) -> Slots:
    words = world.words
    giver, taker = draw.some(words.names, 2)
    what, day = f"{draw.one(words.colours)} {draw.one(words.objects)}", draw.one(DAYS)
    return {
        "shown": f"On {day} {giver} gives the {what} to {taker}.",
        "giver": giver,
        "taker": taker,
        "what": what,
        "day": day,
    }


def ask_back(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb, what = draw.one(words.names), draw.one(words.verbs), draw.one(words.objects)
    rest = f"the {draw.one(words.colours)} {what} near the {draw.one(words.places)}"
    return {"shown": f"{who} {verb.present} {rest}.", "who": who, "verb": verb.base, "what": what}


def change_place(draw: Draw, world: World) -> Slots:
    words = world.words
    who, what = draw.one(words.names), draw.one(words.drinks)
    old, new = draw.some(words.places, 2)
    return {"shown": f"{who} drinks {what} in the {old}.", "who": who, "what": what, "old": old, "new": new}


def invite(draw: Draw, world: World) -> Slots:
    words = world.words
    facts = {
        "guest": draw.one(words.names),
        "place": draw.one(words.places),
        "day": draw.one(DAYS),
        "drink": draw.one(words.drinks),
    }
    shown = draw.some([f"{key}: {value}" for key, value in facts.items()], len(facts))
    return {"shown": "; ".join(shown), **facts}


TASKS: tuple[Task, ...] = (
    Task(
        "sort_words",
        sort_words,
        (
            "[Sort|Order|Arrange] [these|the] words by the alphabet and name the ends: {shown}.",
            "[Sort|Order|Arrange] the [given |]words from A to Z and name the ends.",
            "[Which|What] words are at the ends in alphabetical order: {shown}?",
        ),
        (
            "[Put|Bring] [these|the] words in order by the alphabet and name the ends: {shown}.",
            "Order by the alphabet the given words. Which are at the ends?",
        ),
        (
            "[It begins|They begin] with {first} and [it closes|they close] with {last}",
            "{last} comes [last|after all others], {first} comes [first|before all others]",
            "From {first}, [it goes|you get|they go] all the way to {last}",
        ),
    ),
    Task(
        "sort_numbers",
        sort_numbers,
        (
            "[Sort|Order|Arrange] [these|the] numbers from {order}, in words: {shown}.",
            "[Sort|Order|Arrange] the [given |]numbers from {order}, in words.",
            "From {order}, how do you [sort|order] {shown}?",
        ),
        (
            "How do you [sort|order] the numbers {shown} from {order}?",
            "From {order}, arrange the given numbers in words.",
        ),
        (
            "[In order|Sorted][:| they are] {result}",
            "The [right|sorted] order [is|must be] {result}",
            "[Sorted|In order], [you get|this becomes|this gives] {result}",
        ),
    ),
    Task(
        "reverse",
        reverse,
        (
            "[Reverse|Turn around] this list: {shown}.",
            "[Reverse|Turn around] the [given |]list.",
            "[Say|Write] the words backwards: {shown}.",
        ),
        (
            "[Write|Say] this list backwards: {shown}.",
            "Turn the given words around.",
        ),
        (
            "[Backwards|Reversed][:| it is] {result}",
            "The [list|order] [is|reads] now {result}",
            "[Backwards|Reversed], [you get|this becomes|this gives] {result}",
        ),
    ),
    Task(
        "drop_word",
        drop_word,
        (
            "[Remove|Drop|Delete] {word} and name the new ends of the list: {shown}.",
            "[Remove|Drop|Delete] the word {word} and name the new ends.",
            "How many words and which ends has {shown} without {word}?",
        ),
        (
            "From {shown}, [remove|drop|delete] the word {word} and name the ends.",
            "How many words and which ends are left without {word}?",
        ),
        (
            "{last} is [now |]the last of {count}, {first} is the first",
            "There are {count} left: {last} comes last, {first} [is in front|comes first]",
            "[It closes|You close] with {last} and [it begins|you begin] with {first}, {count} in all",
        ),
    ),
    Task(
        "replace_word",
        replace_word,
        (
            "[Replace {word} with|Change {word} to] {new} and say where it is: {shown}.",
            "[Replace the word {word} with|Change the word {word} to] {new} and say where it is.",
            "Put {new} in place of {word} and say where it is: {shown}.",
        ),
        (
            "In the list {shown}, [replace {word} with|change {word} to] {new}. Where is it?",
            "Put the word {new} in place of {word}. Where is it?",
        ),
        (
            "The {place} [word|one] [is|becomes] {new}[, no longer {word}|]",
            "{new} [now stands|stands now|comes] {place}, where {word} was before",
            "[Counted from the start|From the left], {new} [is|comes] {place}",
        ),
    ),
    Task(
        "swap_ends",
        swap_ends,
        (
            "[Swap|Exchange] the first and the last word: {shown}.",
            "[Swap|Exchange] the two words at the ends.",
            "Let the first and the last word change places: {shown}.",
        ),
        (
            "[Exchange|Swap] the words at the ends: {shown}.",
            "Let the two words at the ends change places.",
        ),
        (
            "{last} is [now in front|at the start], {first} [now closes it|comes after all]",
            "It [begins|starts] with {last} and [ends|closes] with {first}",
            "[Now|Swapped,] {last} [leads|goes ahead], and {first} [is at the back|follows at the end]",
        ),
    ),
    Task(
        "nth_word",
        nth_word,
        (
            "[What|Which] is the {place} word in {shown}?",
            "[Name|Give] the {place} word.",
            "[Name|Give] the {place} word of this list: {shown}.",
        ),
        (
            "In the list {shown}, [what|which] word is the {place}?",
            "[What|Which] word is the {place} one?",
        ),
        (
            "[It|That|This one] must be {result}, [I think|as you can see]",
            "[There|At that place] you [find|read|see] {result}",
            "[Counted from the start|If you count], it must be {result}",
        ),
    ),
    Task(
        "longest_word",
        longest_word,
        (
            "[What|Which] is the longest word in {shown}?",
            "[Find|Name] the longest word.",
            "[Find|Name] the longest word of this list: {shown}.",
        ),
        (
            "In the list {shown}, [what|which] word is the longest?",
            "[What|Which] word is the longest one?",
        ),
        (
            "[It|That|This] must be {result}, with {letters} letters",
            "{result} has {letters} letters, [more than all others|the others have fewer]",
            "No other [one |]is as long as {result}",
        ),
    ),
    Task(
        "count_word",
        count_word,
        (
            "How [often|many times] does {word} [appear|occur] in {shown}?",
            "Count the word {word}.",
            "Count the word {word} in this list: {shown}.",
        ),
        (
            "In the list {shown}, how [often|many times] is {word}?",
            "How many times does the word {word} [appear|occur]?",
        ),
        (
            "[You find|I find|I count|We see] it {times}",
            "{times}, among {total} [in all|that are given]",
            "[It is there|You have it] {times}, out of {total}",
        ),
    ),
    Task(
        "pick_kind",
        pick_kind,
        (
            "From the end, [which|what] {kind} are in this list: {shown}?",
            "[Find|Name|List] the {kind}, from the end.",
            "[Find|Name|List] all {kind} from the end: {shown}.",
        ),
        (
            "In the list {shown}, [find|name] the {kind} from the end.",
            "From the end, [which|what] {kind} are there?",
        ),
        (
            "[I see|You see|We find] [here|there] the following: {result}",
            "[Read|Taken] backwards, [they are|you get|we get] {result}",
            "[They|These] must be {result}, and no [others|more]",
        ),
    ),
    Task(
        "next_number",
        next_number,
        (
            "[What|Which number] comes next: {shown}?",
            "[Continue|Go on with] the numbers.",
            "[Name|Give] the next number: {shown}.",
        ),
        (
            "[What|Which number] comes next in the list {shown}?",
            "Go on with the list and [name|give] the next number.",
        ),
        (
            "[You get|Then it is|After that it must be] {result}, [I think|of course]",
            "[It is|Then you get] {result}, [since|as] each step adds {stride}",
            "{result}, which is {stride} more than the [last|one before]",
        ),
    ),
    Task(
        "add_up",
        add_up,
        (
            "{shown} How many {what} does {who} have [now|then]?",
            "How many {what} does {who} have [now|then]?",
            "{shown} [Count|Say] the {what} of {who}.",
        ),
        (
            "[Count|Say] how many {what} {who} has then: {shown}",
            "[Say|Count] the {what} that {who} has.",
        ),
        (
            "[It is|There are] [now|then] {result} [of them|in all]",
            "That [makes|leaves|comes to] {result} {what}, [if you count|as you see]",
            "[You count|I count|We get] {result} [now|then], all for {who}",
        ),
    ),
    Task(
        "where_is",
        where_is,
        (
            "[Where is|In which place is] the {what}? {shown}",
            "Where is the {what}?",
            "{shown} Where [is|can you find] the {what}?",
        ),
        (
            "{shown} In which place [is|can you find] the {what}?",
            "In which place can you find the {what}?",
        ),
        (
            "[Go|Come] to the {place} and look [there|around]",
            "The {place} is where [it is|it must be|you find it]",
            "[You|We] will find it at the {place}",
        ),
    ),
    Task(
        "who_likes",
        who_likes,
        (
            "[Who|Which person] {does} the {what}? {shown}",
            "[Who|Which person] {does} the {what}?",
            "{shown} [Who|Which person] {does} the {what}?",
        ),
        (
            "{shown} Name the person who {does} the {what}.",
            "Say which person {does} the {what}.",
        ),
        (
            "[It|That|The person] must be {who}[, I think|, of course]",
            "{who} does so[, and no one else|, not the others]",
            "Of all these people it [is|must be] {who}",
        ),
    ),
    Task(
        "when_goes",
        when_goes,
        (
            "[When|On which day] does {who} go to the {place}? {shown}",
            "[When|On which day] does {who} go out?",
            "{shown} [When|On which day] does {who} go to the {place}?",
        ),
        (
            "{shown} Say on which day {who} goes to the {place}.",
            "Name the day when {who} goes out.",
        ),
        (
            "{day} is [the day|the time] when [that is|you see it]",
            "[It must be|That is] each {day}, [I think|of course]",
            "[Wait until|Look out on|Be there on] {day}, when {who} [does so|is there]",
        ),
    ),
    Task(
        "describe",
        describe,
        (
            "[Describe|Present] this person[ in a sentence|]: {shown}.",
            "[Describe|Present] the person[ in a sentence|].",
            "Write a sentence about this person: {shown}.",
        ),
        (
            "In a sentence, [present|describe] this person: {shown}.",
            "Write about the person.",
        ),
        (
            "[This is|Here is] {name}, who [is|works as] a {job} near the {place} and likes {drink}",
            "{name} [likes|wants|has] {drink} and [is|works as] a {job} near the {place}",
            "The {job} who is near the {place} and [likes|wants|has] {drink} [is|is called] {name}",
        ),
    ),
    Task(
        "change_tense",
        change_tense,
        (
            "[Say|Write] in the {tense} tense who does it: {shown}",
            "[Say|Write] in the {tense} tense who does it.",
            "Who does it, in the {tense} tense? {shown}",
        ),
        (
            "In the {tense} tense, who does it? {shown}",
            "Who does it? [Say|Write] it in the {tense} tense.",
        ),
        (
            "The one who {does} it [{when} |]{is} {who}",
            "It {is} {who} who {does} it[ {when}|, I think]",
            "[The person that|Whoever] {does} it {is} {who}",
        ),
    ),
    Task(
        "negate",
        negate,
        (
            "[Deny|Negate] this: {shown}",
            "[Deny|Negate] the sentence.",
            "[Say|Write] the opposite with not: {shown}",
        ),
        (
            "[Negate|Deny] the sentence: {shown}",
            "[Write|Say] the opposite of the sentence with not.",
        ),
        (
            "[No, |In fact, |]that {what} is [not|never] {done} by {who}",
            "No one will {verb} it, [not even|least of all] {who}",
            "It is [false|not true] that {who} would {verb} [it|that]",
        ),
    ),
    Task(
        "be_polite",
        be_polite,
        (
            "[Make this more polite|Say this politely]: {shown}",
            "Turn the order into a [polite|kind] [request|question].",
            "How do you [kindly|politely] say: {shown}",
        ),
        (
            "Turn this into a [kind|polite] [question|request]: {shown}",
            "Make the order polite.",
        ),
        (
            "[Dear |]{who}, [could|would|can] you [please|kindly] {verb} it?",
            "[I would like to|May I|Let me] ask {who} to {verb} it",
            "{who}, about that {what}: [please {verb} it|would you {verb} it, thank you]",
        ),
    ),
    Task(
        "make_plural",
        make_plural,
        (
            "[Change|Turn] this to {many}: {shown}.",
            "[Change|Turn] the words to {many}.",
            "There are {many}, not one. [Say|Write] it: {shown}.",
        ),
        (
            "[Say|Write] this with {many}, not one: {shown}.",
            "There are {many}. Change the words.",
        ),
        (
            "[Now|Then] {many} {what} are there, all [of them |]{colour}",
            "At the {place} [we have|you see] {many} {what} [now|then]",
            "All {many} {what} at that place are {colour}",
        ),
    ),
    Task(
        "compare_ages",
        compare_ages,
        (
            "{shown} Who is [older|the older one]?",
            "Who is [older|the older one]?",
            "[Compare|Say who is older]: {shown}",
        ),
        (
            "{shown} Say who is [older|the older one].",
            "Which person is older?",
        ),
        (
            "[That|This] must be {older}[, not {younger}|]",
            "Of [the|these] two, {older} was born first",
            "{younger} was born [later|after that], so it must be {older}",
        ),
    ),
    Task(
        "make_passive",
        make_passive,
        (
            "[Rewrite|Put] this in the passive: {shown}",
            "[Rewrite|Put] the sentence in the passive.",
            "[Say|Write] it with {who} at the end: {shown}",
        ),
        (
            "In the passive, [say|write] this: {shown}",
            "[Say|Write] the sentence with {who} at the end.",
        ),
        (
            "That {what} [is|gets] {done} there by {who}",
            "[There|At that place], it [is|gets] {done} by {who}",
            "At the {place}, it is {who} by whom that {what} [is|gets] {done}",
        ),
    ),
    Task(
        "turn_gift",
        turn_gift,
        (
            "[Say|Write] what {taker} gets: {shown}",
            "[Say|Write] this as {taker} sees it: {shown}",
            "What does {taker} get, and [when|from whom]?",
        ),
        (
            "What does {taker} get: {shown}",
            "[Write|Say] what {taker} gets and when.",
        ),
        (
            "{taker} [receives|is given] it from {giver} [this|next] {day}",
            "For {taker} there is a {what}, [sent by|from] {giver}",
            "[Next|This] {day}, {taker} receives [it|that] from {giver}",
        ),
    ),
    Task(
        "ask_back",
        ask_back,
        (
            "[Turn|Change] this to a question: {shown}",
            "[Turn|Change] the sentence to a question.",
            "Which question does this answer: {shown}",
        ),
        (
            "Which question is the sentence an answer to?",
            "To a question, [turn|change] this: {shown}",
        ),
        (
            "[Who is|Is it {who}] going to {verb} it?",
            "Which {what} [did|will|can] {who} {verb}, and where?",
            "[Did|Will|Can] you see who [is|was] at that {what}?",
        ),
    ),
    Task(
        "change_place",
        change_place,
        (
            "[Rewrite|Change] this for the {new}: {shown}",
            "[Rewrite|Change] the sentence for the {new}.",
            "The place is [really|now] the {new}. Correct this: {shown}",
        ),
        (
            "For the {new}, [rewrite|correct] this: {shown}",
            "The place is now the {new}. Change the sentence.",
        ),
        (
            "At the {new} there is {what} for {who}",
            "[You see|You meet|We see] {who} at the {new}, [not|no longer] at that {old}",
            "The {new} is where {what} is [now |]for {who}",
        ),
    ),
    Task(
        "invite",
        invite,
        (
            "[Write|Make] an invitation: {shown}.",
            "[Write|Make] an invitation from these facts.",
            "Invite the guest: {shown}.",
        ),
        (
            "Make from these facts an invitation: {shown}.",
            "Write to the guest and invite.",
        ),
        (
            "Dear {guest}, [please|do] come to the {place} on {day} for {drink}",
            "[Hello|Dear] {guest}, on {day} we [have|will have] {drink} in the {place}",
            "Will you have {drink} with us on {day} in the {place}, [dear |]{guest}?",
        ),
    ),
    Task(
        "join_facts",
        join_facts,
        (
            "[Join|Combine] the two sentences: {shown}",
            "[Join|Combine] the two sentences.",
            "[Say|Write] this in one sentence: {shown}",
        ),
        (
            "In one sentence, [say|write] this: {shown}",
            "[Say|Write] the two sentences in one.",
        ),
        (
            "{second} has {what} there, [and so does|just like|together with] {first}",
            "At the {place} [they both have|the two have] {what}",
            "There is {what} for {second} and [also |]for {first}",
        ),
    ),
)
