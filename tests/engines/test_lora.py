"""LoRA adapters are models of their own: what each says is what PEFT says of it, whatever runs beside it."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.batching import engine as transformers_engine
from fastchat_q.workers.engines.batching import lora
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.batching.passes import Model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastchat_q.choices import AS_IT_IS
from fastchat_q.errors import ConfigurationError
from fastchat_q.jobs import Job

from .conftest import Drive
from .driving import Driver, job
from .random_models import loaded, random_model, random_t5
from .scenes import generated, prompt_ids, question

KINDS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "large": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "mixed": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "down_proj", "up_proj"],
        "rank_pattern": {"o_proj": 6},
        "alpha_pattern": {"layers.1.mlp.up_proj": 32},
    },
}
MODELS = ["base", *KINDS]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT


def write_adapter(model: PreTrainedModel, folder: Path, seed: int, **entries: Any) -> None:
    """An adapter that says something else than the base, written by PEFT."""
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**entries))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.4)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def on(model: PreTrainedModel, folders: dict[str, str]) -> lora.Adapters:
    """Adapters on a base, as a worker loads them."""
    return lora.load(model, "base", lora.fetch(folders, AS_IT_IS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for seed, (name, entries) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp(name)
        write_adapter(random_model("llama"), folder, seed, **entries)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], tuple[int, ...]]:
    """What PEFT's own `generate` says as each of the models."""
    references: dict[str, Any] = {"base": random_model("llama")}
    for name, folder in folders.items():
        references[name] = PeftModel.from_pretrained(random_model("llama"), folder)
    return lambda model, text: generated(references[model], prompt_ids(tokenizer, text), TOKENS)


TOKENS = 16


def asked(model: str, text: str, job_id: str = "") -> Job:
    return replace_model(job(job_id or model, text, max_tokens=TOKENS), model)


def replace_model(one: Job, model: str) -> Job:
    return one.model_copy(update={"model": model})


@pytest.fixture(scope="module")
def adapted(folders: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    base = loaded(random_model("llama"), tokenizer)
    adapters = on(base.model, folders)
    engine = transformers_engine.build("base", 8, base, adapters=adapters)
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.fixture(scope="module")
def running(adapted: TransformersEngine) -> Iterator[Driver]:
    driver = Driver(adapted)
    yield driver
    adapted.stop()
    assert adapted.failure is None


def test_each_adapter_says_what_peft_says_of_it_and_the_base_what_it_says_alone(
    running: Driver, expected: Callable[[str, str], tuple[int, ...]]
) -> None:
    said = set()
    for model in MODELS:
        [answer] = running.run(asked(model, question(5)))
        assert answer.ids == expected(model, question(5))
        said.add(answer.ids)
    assert len(said) == len(MODELS), "else nothing was shown"


def test_requests_of_different_adapters_that_join_and_leave_each_others_steps_do_not_mix(
    running: Driver, expected: Callable[[str, str], tuple[int, ...]]
) -> None:
    jobs = [
        asked(MODELS[i % 4], question(i), f"together{i}").model_copy(
            update={"sampling": job("x", max_tokens=4 + 12 * (i % 3 != 0)).sampling}
        )
        for i in range(8)
    ]
    running.submit(*jobs[:5])
    running.wait_tokens("together1", 3)
    running.submit(*jobs[5:])
    for i, answer in enumerate(running.wait(*(one.id for one in jobs))):
        count = jobs[i].sampling.max_tokens
        assert answer.ids == expected(jobs[i].model, question(i))[:count]


def test_a_computed_prefix_is_not_shared_with_another_adapter(
    running: Driver, expected: Callable[[str, str], tuple[int, ...]]
) -> None:
    text = " ".join(question(i) for i in range(20))
    for round_ in range(2):
        for model in MODELS:
            [answer] = running.run(asked(model, text, f"{model}{round_}"))
            assert answer.ids == expected(model, text)


def test_an_answer_of_an_adapter_that_was_interrupted_goes_on_as_that_adapter(
    running: Driver, expected: Callable[[str, str], tuple[int, ...]]
) -> None:
    whole = expected("large", question(3))
    running.resume(asked("large", question(3), "again"), whole[:7])
    [answer] = running.wait("again")
    assert answer.ids == whole[7:]


def test_several_choices_of_an_adapter_are_all_its_own(
    running: Driver, expected: Callable[[str, str], tuple[int, ...]]
) -> None:
    [answer] = running.run(replace_model(job("n", question(4), max_tokens=TOKENS, n=2), "small"))
    for choice in range(2):
        ids = tuple(i for piece in answer.pieces if piece.choice == choice for i in piece.ids)
        assert ids == expected("small", question(4))


def test_the_registry_is_told_what_each_adapter_changes(adapted: TransformersEngine) -> None:
    assert [(card.name, card.base) for card in adapted.cards] == [("base", None), *((n, "base") for n in KINDS)]


def test_rows_of_the_base_are_the_same_to_the_bit_beside_rows_of_an_adapter(folders: dict[str, str]) -> None:
    plain, base = random_model("llama"), random_model("llama")
    torch.nn.Module.float(plain), torch.nn.Module.float(base)
    adapters = on(base, folders)
    ids = torch.arange(3, 27).view(2, 12)
    positions = torch.arange(12).expand(2, 12)
    with torch.inference_mode():
        before, after = Model(plain), Model(base, adapters=adapters)
        expected = before(ids, positions, before.new_cache(), keep=0)
        logits = after(ids, positions, after.new_cache(), keep=0, owners=[("", 12), ("large", 12)])
        assert torch.equal(logits[0], expected[0])
        assert not torch.allclose(logits[1], expected[1], atol=0.1)
        assert torch.equal(after(ids, positions, after.new_cache(), keep=0), expected)


@pytest.mark.parametrize(
    ("kind", "targets"), [("falcon", ["query_key_value"]), ("gpt2", ["c_attn"]), ("llama4", ["q_proj", "o_proj"])]
)
def test_adapters_do_not_mix_on_models_of_other_ways(
    kind: str, targets: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, drive: Drive
) -> None:
    write_adapter(random_model(kind), tmp_path, 3, r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    base = loaded(random_model(kind), tokenizer)
    adapters = on(base.model, {"other": str(tmp_path)})
    driver = drive(transformers_engine.build("base", 8, base, adapters=adapters))
    references: dict[str, Any] = {
        "base": random_model(kind),
        "other": PeftModel.from_pretrained(random_model(kind), tmp_path),
    }
    jobs = [asked(("base", "other")[i % 2], question(i), str(i)) for i in range(4)]
    for i, answer in enumerate(driver.run(*jobs)):
        ids = prompt_ids(tokenizer, question(i))
        assert answer.ids == generated(references[jobs[i].model], ids, TOKENS), (kind, i)


def test_a_model_that_runs_through_generate_has_adapters_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, drive: Drive
) -> None:
    write_adapter(random_t5(), tmp_path, 3, r=4, target_modules=["q", "v"])
    base = loaded(random_t5(), tokenizer)
    engine = transformers_engine.build("base", 4, base, adapters=on(base.model, {"other": str(tmp_path)}))
    assert isinstance(engine, GenerateEngine)
    driver = drive(engine)
    reference: Any = PeftModel.from_pretrained(random_t5(), tmp_path)
    answers = driver.run(asked("other", "hi"), asked("base", "hi"))
    ids = prompt_ids(tokenizer, "hi")
    assert answers[0].ids == generated(reference, ids, TOKENS)
    assert answers[1].ids == generated(random_t5(), ids, TOKENS) != answers[0].ids


def damaged(
    folder: str, target: Path, config: dict[str, Any], tensors: Callable[[dict[str, torch.Tensor]], Any]
) -> str:
    entries = json.loads((Path(folder) / lora.CONFIG).read_text()) | config
    (target / lora.CONFIG).write_text(json.dumps(entries))
    weights = load_file(Path(folder) / lora.WEIGHTS)
    tensors(weights)
    save_file(weights, target / lora.WEIGHTS)
    return str(target)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"use_dora": True}, dict.copy, "use_dora=True, which is not served"),
        ({"modules_to_save": ["lm_head"]}, dict.copy, "modules_to_save"),
        ({"target_parameters": ["x"]}, dict.copy, "target_parameters"),
        ({"peft_type": "IA3"}, dict.copy, "its peft_type is 'IA3'"),
        ({"bias": "all"}, dict.copy, "biases of its own"),
        ({"init_lora_weights": "pissa"}, dict.copy, "changes the base's weights"),
        ({"r": 3}, dict.copy, "rank 3, its tensors are (2, 32)"),
        ({"r": None}, dict.copy, "r=None; a number is wanted"),
        ({}, dict.clear, "adapter_model.safetensors is empty"),
        ({}, lambda t: t.pop(Q), "q_proj has no lora_A"),
        ({}, lambda t: t.update({Q: torch.ones(2, 16)}), "maps 32 to 32. It was made for"),
        ({}, lambda t: t.update({Q: torch.full((2, 32), torch.nan)}), "not finite"),
        ({}, lambda t: t.update({Q.replace("layers.0", "layers.7"): t.pop(Q)}), "has no layer model.layers.7"),
        ({}, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t.pop(Q)}), "no lora_"),
        ({}, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t.pop(Q)}), "it has a tensor"),
    ],
)
def test_an_adapter_that_would_not_be_computed_rightly_is_refused(
    folders: dict[str, str], tmp_path: Path, config: dict[str, Any], tensors: Any, said: str
) -> None:
    broken = damaged(folders["small"], tmp_path, config, tensors)
    with pytest.raises(ConfigurationError) as caught:
        on(random_model("llama"), {"broken": broken})
    assert said in str(caught.value)
    assert "LoRA adapter 'broken'" in str(caught.value)


def test_the_output_layer_and_experts_are_refused(tmp_path: Path) -> None:
    write_adapter(random_model("llama"), tmp_path, 0, r=2, target_modules=["lm_head"])
    with pytest.raises(ConfigurationError, match="only linear layers inside the model"):
        on(random_model("llama"), {"broken": str(tmp_path)})
    model: Any = random_model("llama")
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    write_adapter(model, tmp_path, 0, r=2, target_modules=["experts.0"])
    with pytest.raises(ConfigurationError, match="an expert sees tokens in an order of its own"):
        on(model, {"broken": str(tmp_path)})


def test_pickles_and_folders_without_an_adapter_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    model = random_model("llama")
    with pytest.raises(ConfigurationError, match=r"there is no adapter_config\.json"):
        on(model, {"broken": str(tmp_path)})
    (tmp_path / lora.CONFIG).write_bytes((Path(folders["small"]) / lora.CONFIG).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigurationError, match="is a pickle"):
        on(model, {"broken": str(tmp_path)})
    (tmp_path / lora.WEIGHTS).write_bytes(b"broken")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        on(model, {"broken": str(tmp_path)})
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        on(model, {"broken": str(tmp_path / "nowhere")})


def test_a_layer_that_the_model_goes_around_is_refused(
    folders: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its adapter would be served without a part of it."""
    base = loaded(random_model("llama"), tokenizer)
    adapters = on(base.model, folders)
    attention: Any = base.model.model.layers[0].self_attn
    attention.q_proj = _Around(attention.q_proj)
    with pytest.raises(ConfigurationError, match=r"layers\.0\.self_attn\.q_proj, whose weights"):
        transformers_engine.build("base", 4, base, adapters=adapters)


class _Around(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)
