"""The synthetic dialogues that the built-in model learns from: chats, introductions and the use of tools.

Deterministic, as the questions that they are made of. It knows nothing of tokens or of torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from .questions import KINDS, any_name, draw, question
from .world import CAPITALS, SYSTEM_PROMPTS


class ToolTurn(NamedTuple):
    """A question that needs a tool: the arguments to call it with, what it returns, and the answer made of that."""

    prompt: str
    arguments: dict[str, Any]
    result: str
    answer: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call, and how to draw a question that needs it."""

    description: str
    parameters: dict[str, Any]
    generate: Callable[[Random], ToolTurn]

    def definition(self, name: str) -> dict[str, Any]:
        """This tool as an entry of a chat request's ``tools``; every parameter is required."""
        schema = {"type": "object", "properties": self.parameters, "required": list(self.parameters)}
        return {
            "type": "function",
            "function": {"name": name, "description": self.description, "parameters": schema},
        }


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages as a chat request has them (``role``, ``content``), and the tools offered with them, if any."""

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]] = field(default_factory=list)


def weather(rng: Random) -> ToolTurn:
    city = rng.choice(list(CAPITALS.values()))
    prompt = question(rng, f"What is the weather in {city}?|How is the weather in {city}?|Weather in {city}?")
    result = f"{rng.choice(('sunny', 'rainy', 'cloudy', 'windy', 'snowy'))}, {rng.randint(-9, 35)} degrees"
    return ToolTurn(prompt, {"city": city}, result, f"The weather in {city} is {result}.")


def sum_of_two(rng: Random) -> ToolTurn:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    prompt = question(rng, f"What is {a} + {b}?|Add {a} and {b}.|{a} plus {b}?|What is {a} plus {b}?")
    return ToolTurn(prompt, {"a": a, "b": b}, str(a + b), f"The answer is {a + b}.")


def time_of_day(rng: Random) -> ToolTurn:
    city = rng.choice(list(CAPITALS.values()))
    prompt = question(rng, f"What time is it in {city}?|Time in {city}?|What is the time in {city}?")
    result = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
    return ToolTurn(prompt, {"city": city}, result, f"It is {result} in {city}.")


TOOLS: dict[str, Tool] = {
    "get_weather": Tool("Get the weather of a city", {"city": {"type": "string"}}, weather),
    "add": Tool("Add two numbers", {"a": {"type": "integer"}, "b": {"type": "integer"}}, sum_of_two),
    "get_time": Tool("Get the time in a city", {"city": {"type": "string"}}, time_of_day),
}
KINDS_BESIDE_TOOLS = ("greeting", "who are you", "capital", "repeat known", "opposite")


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """What the assistant writes to call a tool."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def user_says(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def assistant_says(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def exchange(rng: Random, kinds: Sequence[str]) -> list[dict[str, str]]:
    """A question of one of these kinds, which is not held out, and its answer."""
    kind = KINDS[rng.choices(kinds, [KINDS[name].weight for name in kinds])[0]]
    prompt, answer = kind.generate(rng) if kind.few else draw(rng, kind.generate, held_out=False)
    return [user_says(prompt), assistant_says(answer)]


def chat(rng: Random) -> Dialogue:
    """Turns that do not depend on each other, at times enough of them to make a long history."""
    num_turns = rng.randint(6, 14) if rng.random() < 0.03 else rng.choice((1, 1, 1, 1, 2, 3))
    return Dialogue([message for _ in range(num_turns) for message in exchange(rng, list(KINDS))])


def introduction(rng: Random) -> Dialogue:
    """The user tells a name, perhaps other things come between, and then it is asked for."""
    name = any_name(rng)
    forms = f"My name is {name}.|I am {name}.|Hello, I am {name}!|Call me {name}.|Hi, my name is {name}."
    messages = [user_says(rng.choice(forms.split("|"))), assistant_says(f"Nice to meet you, {name}!")]
    for _ in range(rng.choice((0, 0, 1, 2))):
        messages += exchange(rng, [kind for kind in KINDS if kind != "your name"])
    asked = question(rng, "What is my name?|Do you know my name?|Who am I?|What's my name?")
    return Dialogue([*messages, user_says(asked), assistant_says(f"Your name is {name}.")])


def tool_use(rng: Random) -> Dialogue:
    """One tool or more are offered: mostly one of them is needed, at times none is."""
    names = rng.sample(list(TOOLS), rng.randint(1, len(TOOLS)))
    definitions = [TOOLS[name].definition(name) for name in names]
    if rng.random() < 0.2:
        return Dialogue(exchange(rng, KINDS_BESIDE_TOOLS), definitions)
    name = rng.choice(names)
    prompt, arguments, result, answer = draw(rng, TOOLS[name].generate, held_out=False)
    messages = [user_says(prompt), assistant_says(tool_call(name, arguments))]
    if rng.random() < 0.6:
        messages += [{"role": "tool", "content": result}, assistant_says(answer)]
    return Dialogue(messages, definitions)


def training_dialogue(rng: Random) -> Dialogue:
    """One dialogue to learn from. None of its prompts is held out (see ``is_held_out``)."""
    dialogue = rng.choices((chat, introduction, tool_use), (82, 8, 10))[0](rng)
    if rng.random() < 0.25:
        dialogue.messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return dialogue
