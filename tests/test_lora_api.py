"""Adapters end to end: their names are models over HTTP, each with its own answers; a broken one stops the start."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastchat_q.workers.engines.loading import model as loading
from peft import LoraConfig, PeftModel, get_peft_model

from .engines.scenes import generated, prompt_ids
from .servers import wait_until
from .stack import Stack

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT
TOKENS = 12
QUESTIONS = ("What is the capital of France?", "How many legs does a spider have?")


@pytest.fixture
def adapters(folder: Path) -> dict[str, Any]:
    """Two adapters of the built-in model: name -> PEFT's model."""
    made: dict[str, Any] = {}
    for seed, name in enumerate(("pirate", "poet")):
        torch.manual_seed(seed)
        targets = ["q_proj", "down_proj"] if seed else ["v_proj", "o_proj"]
        model: Any = get_peft_model(_tiny(), LoraConfig(r=4 + seed, lora_alpha=8, target_modules=targets))
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if "lora_" in path:
                    weight.normal_(std=0.2)
        model.save_pretrained(folder / name)
        made[name] = PeftModel.from_pretrained(_tiny(), folder / name)
    return made


def _tiny() -> Any:
    return loading.load("tiny", device="cpu").model


def test_base_and_adapters_are_models_that_are_asked_at_once(
    stack: Stack, folder: Path, adapters: dict[str, Any]
) -> None:
    flags = [f"--lora={name}={folder / name}" for name in adapters]
    stack.start_worker("--model", "tiny", "--name", "base", "--threads", "1", *flags)
    client = stack.client()
    wait_until(lambda: len(client.models.list().data) == 3, "all are known")
    parents = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert parents == {"base": None, "pirate": "base", "poet": "base"}

    tokenizer = loading.load("tiny", device="cpu").tokenizer
    models = {"base": _tiny(), **adapters}

    def ask(what: tuple[str, str]) -> tuple[str | None, str]:
        model, text = what
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].message.content, answer.model

    asked = [(model, text) for text in QUESTIONS for model in models]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (model, text), (said, name) in zip(asked, answers, strict=True):
        expected = generated(models[model], prompt_ids(tokenizer, text), TOKENS)
        assert said == tokenizer.decode(list(expected), skip_special_tokens=True).rstrip("�"), model
        assert name == model
    assert len({said for said, _ in answers}) == len(answers), "else nothing was shown"
    with pytest.raises(openai.NotFoundError):
        ask(("painter", "hi"))


def test_a_broken_adapter_keeps_the_worker_from_starting_and_says_why(stack: Stack, folder: Path) -> None:
    (folder / "broken").mkdir()
    worker = stack.start("worker", "worker", "--no-supervise", "--model", "tiny", f"--lora=mine={folder / 'broken'}")
    assert worker.wait(240) == 2
    assert f"LoRA adapter 'mine' ({folder / 'broken'}) cannot be served: there is no adapter_config.json" in (
        worker.output()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora", "mine"], "expected NAME=FOLDER or NAME=HUB_ID"),
        (["--lora", "tiny=x"], "another model of this worker is called 'tiny'"),
        (["--lora", "a=x", "--lora", "a=y"], "another model of this worker is called 'a'"),
        (["--lora", "a=x", "--on-demand"], "loaded at once, without --on-demand. Start a worker of its own"),
        (
            ["--lora", "a=x", "--engine", "echo", "--no-supervise"],
            "--lora is not for --engine echo: only for",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(folder: Path, flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "fastchat_q.cli", "worker", "--state-dir", str(folder), *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert said in ran.stderr
