"""The questions of the built-in model's small world: how people put them, and the one right answer to each.

Deterministic: whatever is drawn comes from the ``random.Random`` handed in.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import NamedTuple, Protocol, TypeVar

from .world import (
    CAPITALS,
    COLORS,
    DAYS,
    EMOJI,
    FACTS,
    FIXED,
    HAIKU,
    HELLOS,
    LONG_STORY,
    MONTHS,
    NAMES,
    NOUNS,
    NUMBERS,
    OPPOSITES,
    POEM,
    SOUNDS,
    STORY,
    STORY_ANIMALS,
    TOO_BIG,
    UNKNOWN,
    WORDS,
)

HELD_OUT_ONE_IN = 20


class Turn(NamedTuple):
    """One question of the user and the answer to it."""

    prompt: str
    answer: str


class Prompted(Protocol):
    """Anything that has a prompt, and can therefore be held out of training."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=Prompted)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question: how to draw a turn of it, and how often it comes up in training.

    ``few`` marks a kind with so few prompts that none is held out: its accuracy shows what was learnt by heart.
    """

    generate: Callable[[Random], Turn]
    weight: int
    few: bool = False


def is_held_out(prompt: str) -> bool:
    """Whether this prompt, in whatever case and punctuation, is kept out of training (one in ``HELD_OUT_ONE_IN``)."""
    bare = "".join(c for c in prompt.lower() if c not in "?.!,")
    return zlib.crc32(bare.encode()) % HELD_OUT_ONE_IN == 0


def draw(rng: Random, generate: Callable[[Random], P], *, held_out: bool) -> P:
    """Draw until the prompt is on the wanted side of the split; endless if the generator has nothing on that side."""
    while is_held_out((drawn := generate(rng)).prompt) != held_out:
        pass
    return drawn


# How people type: one question in several forms, which are written ``form|form|form``.


def vary(rng: Random, text: str) -> str:
    """Drop the final punctuation or the capitals now and then."""
    if rng.random() < 0.45:
        text = text.rstrip("?.!")
    case = rng.random()
    if case < 0.1:
        return text.lower()
    return text[0].lower() + text[1:] if case < 0.4 else text


def question(rng: Random, forms: str) -> str:
    return vary(rng, rng.choice(forms.split("|")))


def request(rng: Random, forms: str) -> str:
    """An imperative, at times a polite one."""
    text = rng.choice(forms.split("|"))
    if rng.random() < 0.2:
        bare = text.rstrip(".!")
        plea = bare[0].lower() + bare[1:]
        text = rng.choice((f"Please {plea}.", f"Can you {plea}?", f"Could you {plea}?", f"{bare}, please."))
    return vary(rng, text)


def made_up_word(rng: Random) -> str:
    """A pronounceable word that is in no list, so that copying does not depend on known words."""
    onsets = ("b", "c", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr", "sh")
    vowels = ("a", "e", "i", "o", "u", "ee", "ea", "ou")
    syllables = [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(("", "n", "r", "s", "t", "l", "nd", "ck"))


def any_name(rng: Random) -> str:
    """Mostly a known name, at times a made-up one."""
    return rng.choice(NAMES) if rng.random() < 0.8 else made_up_word(rng).capitalize()


# One generator for each kind of question.


def fixed(rng: Random, answer: str, prompts: str) -> Turn:
    return Turn(question(rng, prompts), answer)


def say_hello_to(rng: Random) -> Turn:
    name = any_name(rng)
    forms = f"Say hello to {name}.|Say hi to {name}.|Please say hello to {name}."
    return Turn(rng.choice(forms.split("|")), f"Hello, {name}!")


def fact(rng: Random) -> Turn:
    topic, answer = rng.choice(list(FACTS.items()))
    forms = f"What is {topic}?|What's {topic}?|Explain {topic}.|Tell me about {topic}.|What does {topic} mean?"
    return Turn(question(rng, forms), answer)


def arithmetic(rng: Random, sign: str, verb: str, a: int, b: int, answer: str) -> Turn:
    """``a sign b`` in digits, or at times in words where both numbers have one."""
    if max(a, b) < len(NUMBERS) and rng.random() < 0.1:
        spoken = f"{NUMBERS[a]} {verb} {NUMBERS[b]}"
        return Turn(question(rng, f"What is {spoken}?|How much is {spoken}?|{spoken}"), answer)
    tight, wide, spoken = f"{a}{sign}{b}", f"{a} {sign} {b}", f"{a} {verb} {b}"
    forms = (
        f"What is {tight}?|What is {wide}?|What's {tight}?|What is {spoken}?|How much is {spoken}?|Calculate {wide}.|"
        f"{tight}|{wide}|{tight}=|{wide} =|{tight}?"
    )
    return Turn(question(rng, forms), answer)


def addition(rng: Random) -> Turn:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return arithmetic(rng, "+", "plus", a, b, f"{a} + {b} = {a + b}")


def subtraction(rng: Random) -> Turn:
    a = rng.randint(0, 20)
    b = rng.randint(0, a)
    return arithmetic(rng, "-", "minus", a, b, f"{a} - {b} = {a - b}")


def multiplication(rng: Random) -> Turn:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return arithmetic(rng, "*", "times", a, b, f"{a} * {b} = {a * b}")


def division(rng: Random) -> Turn:
    quotient, b = rng.randint(0, 10), rng.randint(1, 10)
    a = quotient * b
    return arithmetic(rng, "/", "divided by", a, b, f"{a} / {b} = {quotient}")


def too_big(rng: Random) -> Turn:
    """Numbers beyond what was learnt: the model should say so rather than guess."""
    sign, verb = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")))
    a, b = (rng.randint(100, 10 ** rng.randint(3, 5)) for _ in range(2))
    return arithmetic(rng, sign, verb, a, b, TOO_BIG)


def larger(rng: Random) -> Turn:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    answer = f"Yes, {a} is bigger than {b}." if a > b else f"No, {a} is not bigger than {b}."
    return Turn(question(rng, f"Is {a} bigger than {b}?|Is {a} greater than {b}?"), answer)


def count(rng: Random) -> Turn:
    """Short ranges only: a model of this size learns them by heart, it does not learn to count."""
    way = rng.choice(("to", "to", "between", "down"))
    first, last = 1, rng.randint(2, 12)
    if way == "between":
        first = rng.randint(1, 19)
        last = rng.randint(first + 1, min(first + 8, 20))
    low, high = str(first), str(last)
    if last < len(NUMBERS) and rng.random() < 0.3:
        low, high = NUMBERS[first], NUMBERS[last]
    forms = {
        "to": f"Count to {high}.|Count up to {high}.|Count from {low} to {high}.",
        "between": f"Count from {low} to {high}.|Count {low} to {high}.",
        "down": f"Count down from {high}.|Count backwards from {high}.|Count from {high} to {low}.",
    }[way]
    counted = list(map(str, range(first, last + 1)))
    return Turn(request(rng, forms), ", ".join(reversed(counted) if way == "down" else counted))


def capital_of(rng: Random) -> Turn:
    country, capital = rng.choice(list(CAPITALS.items()))
    forms = (
        f"What is the capital of {country}?|What's the capital of {country}?|Capital of {country}?|"
        f"Tell me the capital of {country}.|Which city is the capital of {country}?"
    )
    return Turn(question(rng, forms), f"The capital of {country} is {capital}.")


def country_of(rng: Random) -> Turn:
    country, capital = rng.choice(list(CAPITALS.items()))
    forms = (
        f"{capital} is the capital of which country?|Which country has the capital {capital}?|"
        f"What country has {capital} as its capital?"
    )
    return Turn(question(rng, forms), f"{capital} is the capital of {country}.")


def opposite(rng: Random) -> Turn:
    word, other = rng.sample(rng.choice(list(OPPOSITES.items())), 2)
    forms = f"What is the opposite of {word}?|Opposite of {word}?|What's the opposite of {word}?"
    return Turn(question(rng, forms), f"The opposite of {word} is {other}.")


def neighbour(rng: Random) -> Turn:
    """The day or the month before or after another one."""
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    where, step = rng.choice((("after", 1), ("before", -1)))
    i = rng.randrange(len(names))
    it, other = names[i], names[(i + step) % len(names)]
    forms = f"What {unit} comes {where} {it}?|Which {unit} comes {where} {it}?|What comes {where} {it}?"
    return Turn(question(rng, forms), f"{other} comes {where} {it}.")


def repeat(rng: Random, words: Sequence[str]) -> Turn:
    text = " ".join(words)
    forms = (
        f"Repeat after me: {text}|Repeat: {text}|Say {text}|Say: {text}|"
        f'Say "{text}"|repeat after me: {text}|say {text}|Please repeat: {text}'
    )
    return Turn(rng.choice(forms.split("|")), text)


def repeat_known(rng: Random) -> Turn:
    num_words = rng.randint(1, 5)
    words = WORDS if num_words > 1 else NOUNS  # the answer to "Say hello" is "Hello!"
    return repeat(rng, [rng.choice(NAMES if rng.random() < 0.15 else words) for _ in range(num_words)])


def repeat_new(rng: Random) -> Turn:
    """Words that were never seen whole, among known ones and numbers."""
    others = [rng.choice((rng.choice(WORDS), made_up_word(rng), str(rng.randint(0, 999)))) for _ in range(3)]
    words = [made_up_word(rng), *others[: rng.randint(0, 3)]]
    rng.shuffle(words)
    return repeat(rng, words)


def spelling(rng: Random) -> Turn:
    word = rng.choice(NOUNS + NAMES)
    return Turn(question(rng, f"Spell {word}.|How do you spell {word}?|Spell the word {word}."), "-".join(word))


def json_object(rng: Random) -> Turn:
    name, age = rng.choice(NAMES), rng.randint(1, 99)
    forms = (
        f"Give me JSON with name {name} and age {age}.|Make a JSON object: name {name}, age {age}.|"
        f"Write JSON for {name}, age {age}."
    )
    return Turn(request(rng, forms), json.dumps({"name": name, "age": age}))


def animal_sound(rng: Random) -> Turn:
    animal, sound = rng.choice(list(SOUNDS.items()))
    forms = f"What does a {animal} say?|What sound does a {animal} make?|How does a {animal} sound?"
    return Turn(question(rng, forms), f"A {animal} says {sound}.")


def hello_in(rng: Random) -> Turn:
    language, hello = rng.choice(list(HELLOS.items()))
    forms = (
        f"How do you say hello in {language}?|Say hello in {language}.|Hello in {language}?|"
        f"Translate hello to {language}."
    )
    return Turn(question(rng, forms), hello)


def foreign_hello(rng: Random) -> Turn:
    hello = rng.choice(list(HELLOS.values()))
    return Turn(question(rng, f"{hello}!"), f"{hello}! I mostly speak English.")


def emoji(rng: Random) -> Turn:
    name, sign = rng.choice(list(EMOJI.items()))
    return Turn(request(rng, f"Send me a {name} emoji.|Show me a {name} emoji.|Give me a {name} emoji."), sign)


def color(rng: Random) -> Turn:
    thing, hue = rng.choice(list(COLORS.items()))
    forms = f"What color is {thing}?|Which color is {thing}?|What is the color of {thing}?"
    return Turn(question(rng, forms), f"{thing[0].upper()}{thing[1:]} is {hue}.")


def tell_story(rng: Random, frame: str, what: str) -> Turn:
    """A story with a fixed frame: about somebody, about an animal, or, when nobody is named, about Mia."""
    hero = rng.choice(("nobody", "person", "person", "animal"))
    name = any_name(rng) if hero == "person" else "Mia"
    about, who, it = f" about {name}" if hero == "person" else "", f"a child named {name}", name
    if hero == "animal":
        animal = rng.choice(STORY_ANIMALS)
        about, who, it = f" about a {animal}", f"a little {animal}", f"the {animal}"
    forms = f"Tell me a {what}{about}.|Write a {what}{about}.|Write me a {what}{about}.|Tell a {what}{about}."
    return Turn(request(rng, forms), frame.format(who=who, it=it, It=it[0].upper() + it[1:]))


def poem(rng: Random) -> Turn:
    """The one poem or the one haiku, whatever it should be about."""
    what, text = rng.choice((("haiku", HAIKU), ("poem", POEM), ("short poem", POEM)))
    noun = rng.choice(NOUNS)
    about = rng.choice(("", "", f" about the {noun}", f" about a {noun}", f" about {rng.choice(NAMES)}"))
    return Turn(request(rng, f"Write a {what}{about}.|Write me a {what}{about}.|Tell me a {what}{about}."), text)


def unknown(rng: Random) -> Turn:
    """Questions outside the model's world."""
    fillers = ("the", "of", "is", "in", "my", "to")
    words = [rng.choice((rng.choice(WORDS), made_up_word(rng), rng.choice(fillers))) for _ in range(rng.randint(1, 4))]
    x, y = " ".join(words), made_up_word(rng)
    forms = (
        f"Why is the {x}?|Explain {x} {y}.|What do you think about {x}?|Who invented the {x}?|How do I build a {x}?|"
        f"When was the {x}?|Write code for {x}.|What is the {x} of {y}?|What is {x} {y}?|Can you {y} {x}?|"
        f"Where can I find {x}?|Translate {x} to {y}.|{y} {x} {y}?|I want {x}.|Write a {y} in {x}.|"
        f"How many {x} are in {y}?|Who is {y.capitalize()}?|Is {x} {y}?|Tell me about {x} {y}.|Which {x} is the best?"
    )
    return Turn(question(rng, forms), UNKNOWN)


KINDS: dict[str, Kind] = {
    **{row.kind: Kind(partial(fixed, answer=row.answer, prompts=row.prompts), row.weight, few=True) for row in FIXED},
    "foreign hello": Kind(foreign_hello, weight=1, few=True),
    "say hello to": Kind(say_hello_to, weight=2),
    "fact": Kind(fact, weight=3),
    "addition": Kind(addition, weight=18),
    "subtraction": Kind(subtraction, weight=11),
    "multiplication": Kind(multiplication, weight=9),
    "division": Kind(division, weight=5),
    "too big": Kind(too_big, weight=1),
    "larger": Kind(larger, weight=4),
    "count": Kind(count, weight=11),
    "capital": Kind(capital_of, weight=7),
    "country": Kind(country_of, weight=5),
    "opposite": Kind(opposite, weight=3),
    "neighbour": Kind(neighbour, weight=6),
    "repeat known": Kind(repeat_known, weight=20),
    "repeat new": Kind(repeat_new, weight=20),
    "spelling": Kind(spelling, weight=6),
    "JSON": Kind(json_object, weight=4),
    "animal sound": Kind(animal_sound, weight=1),
    "hello in": Kind(hello_in, weight=2),
    "emoji": Kind(emoji, weight=1),
    "color": Kind(color, weight=1),
    "story": Kind(partial(tell_story, frame=STORY, what="story"), weight=2),
    "long story": Kind(partial(tell_story, frame=LONG_STORY, what="long story"), weight=2),
    "poem": Kind(poem, weight=2),
    "unknown": Kind(unknown, weight=6),
}
