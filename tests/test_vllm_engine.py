"""The vLLM engine, with a real vLLM: `make test-vllm` runs these in an environment of its own."""

import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.workers.engines.base import Request

from fastchat_q.choices import LoadOptions, WorkerOptions
from fastchat_q.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Guide, Job, Sampling

from .engines.driving import Answer, Driver, job
from .servers import wait_until
from .stack import Stack

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here: make test-vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]  # vLLM starts slowly, and warns

CONTEXT = 512
STARTUP_S = 400.0
LONG = " ".join(f"word{n}" for n in range(20))
OPTIONS = WorkerOptions("", "tiny", "vllm", 16, "auto", "float32", load=LoadOptions(max_model_len=CONTEXT))
EAGER = ("enforce-eager=true",)
"""Without compilation, which takes a minute and changes the order of sums."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama of the benchmarks."""
    make = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "tiny_llama.py"))["make"]
    folder = make(tmp_path_factory.mktemp("models") / "tiny-llama")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture(scope="module")
def reference(model: Path) -> tuple[Any, Any]:
    """The same model as transformers has it, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def adapter(reference: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the model, of rank 8, that changes a lot."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(reference[0].config.num_hidden_layers):
        weight = reference[0].model.layers[layer].self_attn.q_proj.weight
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, weight.shape[1], generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 8, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    """vLLM reads its settings from the environment, and hands it on to its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield


@pytest.fixture(scope="module")
def driver(model: Path, adapter: Path, vllm_environment: None) -> Iterator[Driver]:
    """One engine for all tests: it starts within a minute or so."""
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    options = replace(OPTIONS, model=str(model), engine_arg=EAGER)
    driver = Driver(vllm_setup.build(options, "tiny", {"tiny-adapted": str(adapter)}))
    yield driver
    driver.engine.stop()
    assert driver.engine.failure is None


def asks(job_id: str, text: str = LONG, *, model: str = "tiny", **fields: Any) -> Job:
    """A greedy job of 24 tokens, unless the fields of its sampling say otherwise."""
    sampling = Sampling(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **fields})
    return job(job_id, text).model_copy(update={"model": model, "sampling": sampling})


def generated(reference: tuple[Any, Any], text: str, tokens: int) -> tuple[int, ...]:
    """What ``generate`` makes, greedily."""
    model, tokenizer = reference
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tuple(made[0, prompt["input_ids"].shape[1] :].tolist())


def resumed(driver: Driver, one: Job, prior: Sequence[Piece]) -> Answer:
    """The rest of an answer that was cut off."""
    driver._answers[one.id] = Answer()
    driver.engine.submit(Request(one, one.id, tuple(prior)))
    [answer] = driver.wait(one.id)
    return answer


@needs_vllm
def test_greedy_answers_are_those_of_generate_alone_and_in_a_batch(driver: Driver, reference: tuple[Any, Any]) -> None:
    texts = [f"word{n} " * (n + 1) for n in range(8)]
    expected = [generated(reference, text, 40) for text in texts]
    [alone] = driver.run(asks("alone", texts[0], max_tokens=40))
    assert alone.ids == expected[0]
    together = driver.run(*[asks(f"b{n}", text, max_tokens=40) for n, text in enumerate(texts)])
    assert [answer.ids for answer in together] == expected
    assert alone.text == reference[1].decode(alone.ids)
    assert alone.finish_reason == "length"
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 40


@needs_vllm
def test_all_outputs_of_a_step_come_in_one_call(driver: Driver) -> None:
    before = driver.engine.steps
    driver.run(*[asks(f"s{n}", max_tokens=50) for n in range(8)])
    assert driver.engine.steps - before < 8 * 50 / 3  # one a step, but for those in which some were still prefilled


@needs_vllm
def test_what_cannot_be_served_fails_alone(driver: Driver) -> None:
    good, long, unclosed, unknown, biased = driver.run(
        asks("good"),
        asks("long", max_tokens=CONTEXT),
        asks("unclosed", guide=Guide(kind="regex", value="(")),
        asks("unknown", guide=Guide(kind="json_schema", value='{"type": "nothing"}')),
        asks("biased", logit_bias={999_999: 1.0}),
    )
    assert good.finish_reason == "length"
    assert isinstance(long.ended.error, ContextLengthError)  # type: ignore[union-attr]
    for answer in (unclosed, unknown, biased):
        assert answer.ended is not None
        assert isinstance(answer.ended.error, InvalidRequestError), answer.ended.error
        assert answer.ids == ()


@needs_vllm
def test_a_cancelled_job_frees_its_place_and_says_no_more(driver: Driver) -> None:
    engine: Any = driver.engine
    jobs = [asks(f"c{n}", max_tokens=400, n=2) for n in range(8)]
    driver.submit(*jobs)
    for one in jobs:
        driver.wait_tokens(one.id, 4)
        engine.cancel(one.id)
    wait_until(lambda: engine._llm.get_num_unfinished_requests() == 0, "vLLM forgot them")
    count = {one.id: len(driver.answer(one.id).ids) for one in jobs}
    driver.run(asks("after"))
    assert all(len(driver.answer(one.id).ids) - count[one.id] <= 16 for one in jobs)  # what was on its way
    assert not any(driver.answer(one.id).ended for one in jobs)
    wait_until(lambda: engine.resting, "it rests")


@needs_vllm
@pytest.mark.parametrize("cut", [1, 7, 20, 39])
def test_a_resumed_answer_goes_on_to_the_letter_where_it_was_cut(driver: Driver, cut: int) -> None:
    whole_job = asks(f"whole{cut}", max_tokens=40)
    [whole] = driver.run(whole_job)
    said = [piece for piece in whole.pieces if piece.ids][:cut]
    prior = [Piece(piece.ids, piece.text) for piece in said]
    rest = resumed(driver, asks(f"rest{cut}", max_tokens=40), prior)
    cut_at = len([i for piece in prior for i in piece.ids])
    assert rest.ids == whole.ids[cut_at:]
    assert "".join(piece.text for piece in prior) + rest.text == whole.text
    assert rest.usage == whole.usage


@needs_vllm
def test_characters_and_stop_strings_that_were_cut_in_two_are_whole_again(driver: Driver) -> None:
    tokenizer: Any = driver.engine._tokenizer  # type: ignore[attr-defined]
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert len(euro) == 3
    rest = resumed(
        driver, asks("euro", max_tokens=3, logit_bias={euro[2]: 100.0}), [Piece((euro[0],)), Piece((euro[1],))]
    )
    assert (rest.ids, rest.text) == ((euro[2],), "€")
    a, b = tokenizer.encode("a", add_special_tokens=False) + tokenizer.encode("b", add_special_tokens=False)
    rest = resumed(driver, asks("stop", logit_bias={b: 100.0}, stop=("ab",)), [Piece((a,), "")])
    assert (rest.ids, rest.text, rest.finish_reason) == ((b,), "", "stop")
    rest = resumed(driver, asks("held", max_tokens=2, logit_bias={a: 100.0}, stop=("ab",)), [Piece((a,), "")])
    assert (rest.ids, rest.text, rest.finish_reason) == ((a,), "aa", "length")


@needs_vllm
def test_a_resumed_answer_that_had_ended_ends_at_once(driver: Driver) -> None:
    [whole] = driver.run(asks("all"))
    done = resumed(driver, asks("again"), [Piece(whole.ids, whole.text)])
    assert (done.ids, done.text, done.finish_reason, done.usage) == ((), "", "length", whole.usage)
    ended = resumed(driver, asks("eos", ignore_eos=False), [Piece((5, 0), "x")])
    assert (ended.ids, ended.finish_reason) == ((), "stop")


@needs_vllm
@pytest.mark.parametrize(
    "fields", [{"guide": Guide(kind="regex", value="[a-z]{8}[0-9]{8}")}, {"presence_penalty": 1.5}]
)
def test_what_hangs_on_all_tokens_is_made_again_and_continued(driver: Driver, fields: dict[str, Any]) -> None:
    [whole] = driver.run(asks(f"w{len(fields)}{next(iter(fields))}", **fields))
    prior = [Piece(piece.ids, piece.text) for piece in whole.pieces[:4]]
    rest = resumed(driver, asks(f"r{next(iter(fields))}", **fields), prior)
    assert tuple(i for piece in prior for i in piece.ids) + rest.ids == whole.ids
    assert "".join(piece.text for piece in prior) + rest.text == whole.text
    other = resumed(driver, asks(f"o{next(iter(fields))}", **fields), [Piece((prior[0].ids[0] + 1,), "?")])
    assert other.ended is not None
    assert other.ended.error is not None
    assert other.ended.error.code == "cannot_resume"


@needs_vllm
def test_choices_of_a_job_end_one_by_one_and_resume_one_by_one(driver: Driver) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    [answer] = driver.run(asks("n3", **fields))
    texts = {n: "".join(piece.text for piece in answer.pieces if piece.choice == n) for n in range(3)}
    assert len(set(texts.values())) == 3
    assert sorted(piece.choice for piece in answer.pieces if piece.finish == "length") == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    prior = [piece for piece in answer.pieces if piece.choice == 1]
    rest = resumed(driver, asks("n3 again", **fields), prior)
    assert {piece.choice for piece in rest.pieces} == {0, 2}
    assert len(rest.ids) == 24
    assert rest.usage == answer.usage


@needs_vllm
def test_log_probabilities_are_those_of_the_model(driver: Driver, reference: tuple[Any, Any]) -> None:
    import torch

    [answer] = driver.run(asks("lp", logprobs=3, max_tokens=6, temperature=0.5, seed=3, frequency_penalty=1.0))
    model, tokenizer = reference
    messages = [{"role": "user", "content": LONG}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([[*prompt, *answer.ids]])
    expected = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (tokens, vocabulary)
    given = [one for piece in answer.pieces for one in piece.logprobs]
    assert [one.id for one in given] == list(answer.ids)
    for one, row in zip(given, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-3)
        assert [a.id for a in one.top] == row.topk(3).indices.tolist()
        assert one.token == tokenizer.decode([one.id])


@needs_vllm
def test_each_parameter_does_what_it_says(driver: Driver) -> None:
    [greedy] = driver.run(asks("greedy"))
    first, second = greedy.ids[:2]
    top, biased, stop_id, least, plain_eos, penalty = driver.run(
        asks("top", temperature=1.5, top_k=1),
        asks("biased", logit_bias={77: 100.0}, max_tokens=3),
        asks("stop id", stop_token_ids=(second,)),
        asks("least", logit_bias={0: 100.0}, ignore_eos=False, min_tokens=5),
        asks("eos", logit_bias={0: 100.0}, ignore_eos=False),
        asks("penalty", logit_bias={77: 8.0}, frequency_penalty=2.0, max_tokens=24),
    )
    assert top.ids == greedy.ids
    assert biased.ids == (77, 77, 77)
    assert (stop_id.ids, stop_id.finish_reason) == ((first, second), "stop")
    assert (len(least.ids), least.finish_reason) == (6, "stop")
    assert (plain_eos.ids, plain_eos.text, plain_eos.finish_reason) == ((0,), "", "stop")
    assert 0 < penalty.ids.count(77) < 24


@needs_vllm
def test_a_seed_decides(driver: Driver) -> None:
    answers = [
        driver.run(asks(f"seed{n}", temperature=1.0, seed=seed))[0].ids for n, seed in enumerate((5, 5, -1, -1, 6))
    ]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert len({answers[0], answers[2], answers[4]}) == 3


@needs_vllm
@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (Guide(kind="regex", value="[0-9]{3}-[a-f]{2}"), "[0-9]{3}-[a-f]{2}"),
        (Guide(kind="choice", value='["north", "south"]'), "north|south"),
        (
            Guide(
                kind="json_schema", value='{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'
            ),
            r'\{\s*"a"\s*:\s*[12]\s*\}',
        ),
        (Guide(kind="grammar", value='start: "yes" | "no"'), "yes|no"),
    ],
)
def test_a_guide_is_followed(driver: Driver, guide: Guide, pattern: str) -> None:
    fields: dict[str, Any] = {"guide": guide, "temperature": 1.0, "max_tokens": 60, "ignore_eos": False}
    [answer] = driver.run(asks(f"guided {guide.kind}", **fields))
    assert answer.finish_reason == "stop"
    assert re.fullmatch(pattern, answer.text), answer.text


@needs_vllm
def test_an_adapter_is_a_model_and_never_mixes_with_its_base(
    driver: Driver, reference: tuple[Any, Any], adapter: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    plain = generated(reference, LONG, 24)
    tensors, originals = load_file(adapter / "adapter_model.safetensors"), []
    with torch.no_grad():
        for layer, block in enumerate(reference[0].model.layers):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            weight = block.self_attn.q_proj.weight
            originals.append(weight.clone())
            weight += 2.0 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    adapted = generated(reference, LONG, 24)
    with torch.no_grad():
        for block, original in zip(reference[0].model.layers, originals, strict=True):
            block.self_attn.q_proj.weight.copy_(original)
    assert plain != adapted
    answers = driver.run(*[asks(f"l{n}", model="tiny-adapted" if n % 2 else "tiny") for n in range(6)])
    assert [answer.ids for answer in answers] == [plain, adapted] * 3
    [base] = driver.run(asks("base"))
    assert base.ids == plain


@needs_vllm
def test_every_field_of_a_sampling_reaches_vllm() -> None:
    from fastchat_q.workers.engines.vllm.params import sampling_params

    given = Sampling(
        temperature=0.7, top_p=0.9, top_k=11, min_p=0.05, presence_penalty=0.1, frequency_penalty=0.2,
        repetition_penalty=1.1, logit_bias={3: 1.5}, seed=9, stop=("x",), stop_token_ids=(4,), ignore_eos=True,
        min_tokens=2, logprobs=5, guide=Guide(kind="regex", value="a"),
    )  # fmt: skip
    made = sampling_params(given, 0, 100, 0)
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs", "seed"):
        assert getattr(made, name) == getattr(given, name), name
    for name in ("repetition_penalty", "logit_bias", "ignore_eos", "min_tokens"):
        assert getattr(made, name) == getattr(given, name), name
    assert (made.stop, made.stop_token_ids, made.max_tokens) == (["x"], [4], 100)
    assert made.structured_outputs is not None
    assert made.structured_outputs.regex == "a"
    assert sampling_params(given, 0, 100, 30).max_tokens == 70
    assert sampling_params(given, 0, 100, 30).seed != made.seed != sampling_params(given, 1, 100, 0).seed


@needs_vllm
@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("max-num-batched-token=5", "Did you mean max-num-batched-tokens"),
        ("colour=red", "has no such option"),
        ("max-num-seqs=4", "from its own options"),
        ("enforce-eager=perhaps", "true or false"),
        ("block-size", "needs a value"),
        ("block-size=many", "--engine-arg: argument --block-size"),
    ],
)
def test_an_option_that_vllm_has_not_is_an_error_that_says_what_it_has(pair: str, said: str) -> None:
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    with pytest.raises(ConfigurationError, match=re.escape(said)):
        vllm_setup.build(replace(OPTIONS, model="nowhere", engine_arg=(pair,)), "x")


@needs_vllm
def test_options_reach_vllm_as_on_its_own_command_line() -> None:
    from fastchat_q.workers.engines.vllm.setup import _parse, engine_arguments

    words = engine_arguments(["max_num_batched_tokens=2k", "enable-prefix-caching=false", "enforce-eager"])
    args = _parse(["--model=m", *words, *engine_arguments(["compilation-config.mode=0"])])
    assert (args.max_num_batched_tokens, args.enable_prefix_caching, args.enforce_eager) == (2000, False, True)
    assert args.compilation_config.mode == 0


@needs_vllm
def test_a_model_that_is_not_there_is_a_configuration_error(vllm_environment: None, tmp_path: Path) -> None:
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    with pytest.raises(ConfigurationError, match="vLLM cannot serve"):
        vllm_setup.build(replace(OPTIONS, model=str(tmp_path)), "x")
    with pytest.raises(ConfigurationError, match="is built for"):
        vllm_setup.build(replace(OPTIONS, model=str(tmp_path), device="npu"), "x")


@needs_vllm
def test_the_death_of_vllms_process_ends_the_engine_with_a_reason(model: Path, vllm_environment: None) -> None:
    import psutil
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    before = vllm_processes(psutil.Process())
    engine = vllm_setup.build(replace(OPTIONS, model=str(model), engine_arg=EAGER), "tiny")
    died = threading.Event()
    engine.start(lambda outputs: None, died.set)
    engine.submit(Request(asks("endless", max_tokens=400), "endless"))
    children = [child for child in vllm_processes(psutil.Process()) if child not in before]
    core = next(child for child in children if "EngineCore" in "".join(child.cmdline()))
    os.kill(core.pid, signal.SIGKILL)
    assert died.wait(30)
    assert "engine process ended" in str(engine.failure)
    engine.stop()
    wait_until(lambda: not any(_runs(child) for child in children), "nothing of vLLM is left")


@needs_vllm
def test_a_stream_goes_on_when_its_workers_process_is_killed_and_nothing_of_vllm_is_left_behind(
    stack: Stack, model: Path, vllm_environment: None
) -> None:
    import psutil

    flags = ["--engine", "vllm", "--model", str(model), "--name", "tiny", "--dtype", "float32"]
    flags += ["--max-model-len", str(CONTEXT), *(f"--engine-arg={pair}" for pair in EAGER)]
    worker = stack.start("worker", "worker", *flags)
    wait_until(lambda: not worker.alive or stack.registered(worker.pid), "the worker serves", STARTUP_S)
    assert worker.alive, worker.output()
    client = stack.client().with_options(timeout=STARTUP_S)
    request: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": LONG}], "max_tokens": 400}
    request |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    expected = client.chat.completions.create(**request)
    parts: list[str] = []
    children: list[Any] = []
    for chunk in client.chat.completions.create(**request, stream=True):
        parts += [choice.delta.content or "" for choice in chunk.choices]
        if len(parts) == 10:
            engine = stack.engine_pid(worker)
            children = vllm_processes(psutil.Process(engine))
            os.kill(engine, signal.SIGKILL)
    assert children
    assert "".join(parts) == expected.choices[0].message.content
    wait_until(lambda: not any(_runs(child) for child in children), "nothing of the killed one is left")
    assert worker.stop() == 0


def vllm_processes(process: Any) -> list[Any]:
    """Those below a process; they name themselves."""
    return [child for child in process.children(recursive=True) if "VLLM::" in "".join(child.cmdline())]


def _runs(process: Any) -> bool:
    return bool(process.is_running() and process.status() != "zombie")


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here")
def test_without_vllm_the_error_says_where_to_read_how_to_install_it() -> None:
    command = [sys.executable, "-m", "fastchat_q.cli", "worker", "--no-supervise", "--engine", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "docs/workers/vllm.md" in done.stderr
