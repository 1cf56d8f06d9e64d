"""How well the built-in model has learnt its world: ``python -m fastchat_q.workers.engines.tiny.evaluate [MODEL_DIR]``.

Greedy answers, right only if they match to the letter, to prompts held out of training where a kind has enough. It is
no benchmark: outside its small world the model knows nothing.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .dialogues import TOOLS, assistant_says, tool_call, user_says
from .questions import KINDS, Kind, Turn, draw, made_up_word
from .world import NAMES

MODEL_DIR = Path(__file__).parent / "model"
MAX_NEW_TOKENS = 320  # the long story has about 260
DRAWS_PER_CASE = 20

SAMPLES = (
    "Hello!",
    "Who are you?",
    "What is fastchat-q?",
    "What is 2+2?",
    "what is the capital of japan",
    "Count to five",
    "Repeat after me: hello world",
    "How do you say hello in Japanese?",
    "Send me a rocket emoji.",
    "Give me JSON with name Ann and age 30.",
    "Tell me a joke.",
    "Write a haiku.",
    "Tell me a long story about Mia.",
    "Why is the sky full of violins?",
)


class Case(NamedTuple):
    """A chat request and the one right answer to it."""

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    answer: str


@dataclass(frozen=True, slots=True)
class Chatbot:
    model: Any  # what AutoModelForCausalLM makes has no annotations for ``generate``
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Chatbot":
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), tokenizer)

    def answer(self, cases: list[Case]) -> list[str]:
        """The greedy answer to each of the cases, with the marks of a tool call, if it has any."""
        prompts = [
            self.tokenizer.apply_chat_template(
                case.messages, tools=[*case.tools] or None, tokenize=False, add_generation_prompt=True
            )
            for case in cases
        ]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]  # (batch, length) int64, left-padded
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        end = str(self.tokenizer.eos_token)
        return [str(self.tokenizer.decode(row)).split(end)[0] for row in out[:, ids.shape[1] :].tolist()]


@dataclass(slots=True)
class Score:
    """How many answers were right, and the first one that was not."""

    num_right: int = 0
    num_cases: int = 0
    mistake: str = ""

    def add(self, case: Case, answer: str) -> None:
        self.num_cases += 1
        self.num_right += answer == case.answer
        if answer != case.answer and not self.mistake:
            self.mistake = f"{case.messages[-1]['content']!r} -> {answer[:60]!r}"


def kind_cases(rng: Random, kind: Kind, num_cases: int) -> list[Case]:
    """Up to ``num_cases`` different prompts of this kind: held-out ones, or, where these are few, any."""
    turns: dict[str, Turn] = {}
    for _ in range(num_cases * DRAWS_PER_CASE):
        turn = kind.generate(rng) if kind.few else draw(rng, kind.generate, held_out=True)
        turns.setdefault(turn.prompt, turn)
    return [Case([user_says(turn.prompt)], [], turn.answer) for turn in list(turns.values())[:num_cases]]


def tool_cases(rng: Random, num_cases: int) -> Iterator[Case]:
    """A held-out question with all tools on offer; then the same with the tool's result, to be put into words."""
    definitions = [tool.definition(name) for name, tool in TOOLS.items()]
    for _ in range(num_cases // 2):
        name = rng.choice(list(TOOLS))
        prompt, arguments, result, answer = draw(rng, TOOLS[name].generate, held_out=True)
        called = tool_call(name, arguments)
        asked = [user_says(prompt)]
        yield Case(asked, definitions, called)
        yield Case([*asked, assistant_says(called), {"role": "tool", "content": result}], definitions, answer)


def name_cases(names: list[str]) -> list[Case]:
    """The user's name is asked for, one question after it was told."""
    return [
        Case(
            [
                user_says(f"My name is {name}."),
                assistant_says(f"Nice to meet you, {name}!"),
                user_says("What is 3 + 4?"),
                assistant_says("3 + 4 = 7"),
                user_says("What is my name?"),
            ],
            [],
            f"Your name is {name}.",
        )
        for name in names
    ]


def all_cases(rng: Random, num_cases: int) -> dict[str, list[Case]]:
    """The cases of every kind, by the name under which they are reported."""
    return {
        **{name: kind_cases(rng, kind, num_cases) for name, kind in KINDS.items()},
        "tool": list(tool_cases(rng, num_cases)),
        "name told": name_cases(NAMES[:num_cases]),
        "name told, new": name_cases([made_up_word(rng).capitalize() for _ in range(num_cases)]),
    }


def split_of(name: str) -> str:
    """What a score under this name shows: generalisation, memory, or the copying of words never seen."""
    if name in ("repeat new", "name told, new"):
        return "new words"
    few = name == "name told" or (name in KINDS and KINDS[name].few)
    return "by heart" if few else "held out"


def report_accuracy(chatbot: Chatbot, num_cases: int) -> None:
    splits: dict[str, Score] = {}
    for name, cases in all_cases(Random(123), num_cases).items():
        score, split = Score(), splits.setdefault(split_of(name), Score())
        for case, answer in zip(cases, chatbot.answer(cases), strict=True):
            score.add(case, answer)
            split.add(case, answer)
        print(f"{name:16} {split_of(name):9} {score.num_right:>3}/{score.num_cases:<3} {score.mistake}", flush=True)
    for name, split in splits.items():
        print(f"{'TOTAL':16} {name:9} {split.num_right}/{split.num_cases} = {split.num_right / split.num_cases:.1%}")


def show_samples(chatbot: Chatbot) -> None:
    for prompt in SAMPLES:
        case = Case([{"role": "system", "content": "You are a helpful assistant."}, user_says(prompt)], [], "")
        print(f"\n> {prompt}\n{chatbot.answer([case])[0]}", flush=True)
    tools = [tool.definition(name) for name, tool in TOOLS.items()]
    prompt = "What is the weather in Oslo?"
    print(f"\n> [{', '.join(TOOLS)}] {prompt}\n{chatbot.answer([Case([user_says(prompt)], tools, '')])[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the right answers of the built-in model, kind by kind.")
    parser.add_argument("model_dir", type=Path, nargs="?", default=MODEL_DIR, help="default: the packaged model")
    parser.add_argument("--cases", type=int, default=30, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    chatbot = Chatbot.load(arguments.model_dir)
    report_accuracy(chatbot, arguments.cases)
    show_samples(chatbot)


if __name__ == "__main__":
    main()
