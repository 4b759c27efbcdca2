"""The tasks of the lab: what is asked, and how it may be answered.

A task draws the slots of one instance; its questions and answers are texts with `{slots}` and `[one|another]`
alternatives. A question without `{shown}` puts the shown text into the row's input.
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
    return {"shown": ", ".join(items), "result": listed(draw, sorted(items))}


def sort_numbers(draw: Draw, world: World) -> Slots:
    numbers = draw.some(range(10, 100), draw.between(*world.items))
    down = bool(draw.below(2))
    return {
        "shown": ", ".join(map(str, numbers)),
        "order": "largest to smallest" if down else "smallest to largest",
        "result": listed(draw, [str(number) for number in sorted(numbers, reverse=down)]),
    }


def reverse(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    return {"shown": ", ".join(items), "result": listed(draw, items[::-1])}


def drop_word(draw: Draw, world: World) -> Slots:
    items = _some_things(draw, world)
    gone = draw.one(items)
    return {
        "shown": ", ".join(items),
        "word": gone,
        "result": listed(draw, [item for item in items if item != gone]),
    }


def replace_word(draw: Draw, world: World) -> Slots:
    *items, new = draw.some(world.words.things, draw.between(*world.items) + 1)
    old = draw.one(items)
    return {
        "shown": ", ".join(items),
        "word": old,
        "new": new,
        "result": listed(draw, [new if item == old else item for item in items]),
    }


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
    return {"shown": ", ".join(items), "kind": kind, "result": listed(draw, picked)}


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
        "who": whos[asked],
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
        "tense": "past" if past else "future",
        "result": f"{who} {verb.past if past else 'will ' + verb.base} {rest}",
    }


def negate(draw: Draw, world: World) -> Slots:
    words = world.words
    who, verb = draw.one(words.names), draw.one(words.verbs)
    rest = f"the {draw.one(words.objects)} near the {draw.one(words.places)}"
    return {"shown": f"{who} {verb.present} {rest}.", "who": who, "verb": verb.base, "rest": rest}


def be_polite(draw: Draw, world: World) -> Slots:
    words = world.words
    order = f"{draw.one(words.verbs).base} the {draw.one(words.colours)} {draw.one(words.objects)}"
    return {"shown": f"{order.capitalize()}, {draw.one(words.names)}!", "order": order}


def make_plural(draw: Draw, world: World) -> Slots:
    words = world.words
    colour, what, place = draw.one(words.colours), draw.one(words.objects), draw.one(words.places)
    many = NUMBERS[draw.between(2, 9)]
    return {
        "shown": f"one {colour} {what} in the {place}",
        "many": many,
        "result": f"{many} {colour} {what}s in the {place}",
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
        "rest": f"drink {what} in the {place}",
    }


def swap_ends(draw: Draw, world: World) -> Slots:
    first, *middle, last = _some_things(draw, world)
    return {"shown": ", ".join([first, *middle, last]), "result": listed(draw, [last, *middle, first])}


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
    who, verb = draw.one(words.names), draw.one(words.verbs)
    rest = f"the {draw.one(words.colours)} {draw.one(words.objects)} near the {draw.one(words.places)}"
    return {"shown": f"{who} {verb.present} {rest}.", "who": who, "verb": verb.base, "rest": rest}


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
            "[Sort|Order|Arrange] [these|the] words by the alphabet: {shown}.",
            "[Sort|Order|Arrange] the [given |]words from A to Z.",
            "[Put|Bring] the words in alphabetical order: {shown}.",
        ),
        (
            "[Put|Bring] [these|the] words in order by the alphabet: {shown}.",
            "Order by the alphabet the given words.",
        ),
        (
            "[In order|Sorted|From A to Z][:| they are] {result}",
            "The [right|sorted] order [is|of {shown} is] {result}",
            "[Sorted|From A to Z], {shown} [becomes|gives] {result}",
        ),
    ),
    Task(
        "sort_numbers",
        sort_numbers,
        (
            "[Sort|Order|Arrange] [these|the] numbers from {order}: {shown}.",
            "[Sort|Order|Arrange] the [given |]numbers from {order}.",
            "From {order}, how do you [sort|order] {shown}?",
        ),
        (
            "How do you [sort|order] the numbers {shown} from {order}?",
            "From {order}, arrange the given numbers.",
        ),
        (
            "[In order|Sorted][:| they are] {result}",
            "The [right|sorted] order [is|of {shown} is] {result}",
            "[Sorted|In order], {shown} [becomes|gives] {result}",
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
        ("[Write|Say] this list backwards: {shown}.", "Turn the given words around."),
        (
            "[Backwards|Reversed][:| it is] {result}",
            "The [list|order] [is|of {shown} is] now {result}",
            "[Backwards|Reversed], {shown} [becomes|gives] {result}",
        ),
    ),
    Task(
        "drop_word",
        drop_word,
        (
            "[Remove|Drop|Delete] {word} from this list: {shown}.",
            "[Remove|Drop|Delete] the word {word}.",
            "What is left of {shown} without {word}?",
        ),
        ("From {shown}, [remove|drop|delete] the word {word}.", "What is left without {word}?"),
        (
            "Without {word}[:| it is| there is] {result}",
            "[What is left|The list][:| is] {result}",
            "[If you drop|Without] {word}, {shown} [becomes|gives] {result}",
        ),
    ),
    Task(
        "replace_word",
        replace_word,
        (
            "[Replace {word} with|Change {word} to] {new}: {shown}.",
            "[Replace the word {word} with|Change the word {word} to] {new}.",
            "Put {new} in place of {word}: {shown}.",
        ),
        (
            "In the list {shown}, [replace {word} with|change {word} to] {new}.",
            "Put the word {new} in place of {word}.",
        ),
        (
            "With {new}[:| it is| there is] {result}",
            "[The new list|The list][:| is] {result}",
            "With {new}, {shown} [becomes|gives] {result}",
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
        ("[Exchange|Swap] the words at the ends: {shown}.", "Let the two words at the ends change places."),
        (
            "[The result|The new list][:| is] {result}",
            "[You get|This gives][:| the list] {result}",
            "[Swapped|With new ends], {shown} [becomes|gives] {result}",
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
        ("In the list {shown}, [what|which] word is the {place}?", "[What|Which] word is the {place} one?"),
        (
            "[It|That|The word] [is|must be] {result}",
            "The {place} [word|one] [is|must be] {result}",
            "In {shown} the {place} [word|one] is {result}",
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
        ("In the list {shown}, [what|which] word is the longest?", "[What|Which] word is the longest one?"),
        (
            "The longest [word|one] [is|must be] {result}",
            "[It|That] is {result}, with {letters} letters",
            "In {shown} the longest [word|one] is {result}",
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
            "The word {word} [appears|occurs|is there] {times}",
            "[You find|There is|I count] {word} {times}",
            "In {shown} the word {word} [appears|occurs] {times}",
        ),
    ),
    Task(
        "pick_kind",
        pick_kind,
        (
            "[Which|What] {kind} are in this list: {shown}?",
            "[Find|Name|List] the {kind}.",
            "[Find|Name|List] all {kind} in {shown}.",
        ),
        ("In the list {shown}, [find|name] the {kind}.", "[Which|What] {kind} are there?"),
        (
            "The {kind} [are|there are][:|] {result}",
            "[I see|There are|We find] the {kind} {result}",
            "Of {shown}, the {kind} [are|must be] {result}",
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
            "The next [number|one] [is|must be] {result}",
            "[It is|Next comes] {result}, [since|as] each step adds {stride}",
            "[After|Next to] {shown} comes {result}",
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
        ("[Count|Say] how many {what} {who} has then: {shown}", "[Say|Count] the {what} that {who} has."),
        (
            "{who} [now|then] has {result} {what}",
            "[It is|There are] [now|then] {result} {what}",
            "That [makes|gives] {result} {what} for {who}",
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
        ("{shown} In which place [is|can you find] the {what}?", "In which place can you find the {what}?"),
        (
            "The {what} [is|must be|lies] in the {place}",
            "[It is|You find it|Look for it] in the {place}",
            "{who} has [put|left] the {what} in the {place}",
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
        ("{shown} Name the person who {does} the {what}.", "Say which person {does} the {what}."),
        (
            "{who}[ is the one who| is who|] {does} the {what}",
            "[It|That|The person] [is|must be] {who}",
            "The {what}? It [is|must be] {who} who {does} it",
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
        ("{shown} Say on which day {who} goes to the {place}.", "Name the day when {who} goes out."),
        (
            "{who} [goes|will go] to the {place} on {day}",
            "[It is|It must be|That is] on {day}",
            "{day} is [the day|the time] when {who} goes to the {place}",
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
        ("In a sentence, [present|describe] this person: {shown}.", "Write about the person."),
        (
            "{name} is a {job} who [lives|works] near the {place} and [likes|drinks] {drink}",
            "{name} [likes|drinks] {drink} and [is|works as] a {job} near the {place}",
            "The {job} near the {place} [is|is called] {name}, who [likes|drinks] {drink}",
        ),
    ),
    Task(
        "change_tense",
        change_tense,
        (
            "[Rewrite|Put] this in the {tense} tense: {shown}",
            "[Rewrite|Put] the sentence in the {tense} tense.",
            "[Say|Write] it in the {tense} tense: {shown}",
        ),
        ("In the {tense} tense, [say|write] this: {shown}", "[Say|Write] the sentence in the {tense} tense."),
        ("[So|Now|Then][:|,] {result}", "In the {tense}[:|,] {result}", "[You|I|We] say: {result}"),
    ),
    Task(
        "negate",
        negate,
        (
            "[Deny|Negate] this: {shown}",
            "[Deny|Negate] the sentence.",
            "[Say|Write] the opposite with not: {shown}",
        ),
        ("[Negate|Deny] the sentence: {shown}", "[Write|Say] the opposite of the sentence with not."),
        (
            "[No, |In fact, |]{who} does not {verb} {rest}",
            "{who} [would never|will not|does not] {verb} {rest}",
            "It is [false|not true] that {who} would {verb} {rest}",
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
        ("Turn this into a [kind|polite] [question|request]: {shown}", "Make the order polite."),
        (
            "[Could|Would|Can] you [please|kindly] {order}?",
            "Please {order}[, thank you|, if you can|]",
            "[I would like to|May I|Let me] ask you to {order}",
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
        ("[Say|Write] this with {many}, not one: {shown}.", "There are {many}. Change the words."),
        (
            "[There are|We have|You see] [now|then] {result}",
            "[Now it is|That makes|That gives] {result}",
            "Not one but {result}",
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
        ("{shown} Say who is [older|the older one].", "Which person is older?"),
        (
            "{older} is [older|the older one][, not {younger}|]",
            "[It|That|The older one] [is|must be] {older}",
            "{younger} is younger than {older}",
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
        ("In the passive, [say|write] this: {shown}", "[Say|Write] the sentence with {who} at the end."),
        (
            "The {what} [is|gets] {done} in the {place} by {who}",
            "In the {place} the {what} [is|gets] {done} by {who}",
            "It is {who} by whom the {what} [is|gets] {done} in the {place}",
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
        ("What does {taker} get: {shown}", "[Write|Say] what {taker} gets and when."),
        (
            "{taker} [gets|receives] the {what} from {giver} on {day}",
            "On {day} {taker} [gets|receives] the {what} from {giver}",
            "The {what} [goes|comes] from {giver} to {taker} on {day}",
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
        ("Which question is the sentence an answer to?", "To a question, [turn|change] this: {shown}"),
        (
            "Does {who} {verb} {rest}?",
            "[Who is|Is it {who}] going to {verb} {rest}?",
            "[Did|Will|Can] {who} {verb} {rest}?",
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
            "{who} drinks {what} in the {new}[, not in the {old}|]",
            "In the {new} {who} [drinks|has] {what}",
            "It is in the {new} that {who} [drinks|has] {what}",
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
        ("Make from these facts an invitation: {shown}.", "Write to the guest and invite."),
        (
            "Dear {guest}, [please|do] come to the {place} on {day} for {drink}",
            "[Hello|Dear] {guest}, on {day} we have {drink} in the {place}",
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
        ("In one sentence, [say|write] this: {shown}", "[Say|Write] the two sentences in one."),
        (
            "{first} and {second}[ both| now|] {rest}",
            "Both {first} and {second} {rest}",
            "[They|The two|Both] {rest}: {first} and {second}",
        ),
    ),
)
