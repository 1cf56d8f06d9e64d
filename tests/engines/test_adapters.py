"""Adapters are found through entry points of installed packages, and a wrong one is named."""

from pathlib import Path

import pytest
import torch
from fastchat_q.workers import adapters
from fastchat_q.workers.engines.adapted import AdaptedEngine
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.loading.model import Loaded, load
from fastchat_q.workers.engines.processing.rendering import Renderer
from transformers import AutoTokenizer

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import ConfigurationError, InvalidRequestError
from fastchat_q.jobs import Job, Message
from tests.families.adapter_package import install

from .conftest import Drive
from .driving import job

MATCH = "class Adapter:\n    def match(self, config):\n        return config.get('model_type') == 'mine'\n"
COUNTING = '''
from transformers import AutoModelForCausalLM, AutoTokenizer

class Adapter:
    """Counts upwards from the number that it is asked, in the built-in model's tokens."""
    closed = 0

    def match(self, config):
        return config.get("model_type") == "llama"

    def template(self, messages, *, tools, **options):
        if tools:
            raise ValueError("it calls no tools")
        return messages[-1]["content"]

    def generate(self, model, tokenizer, prompt, done, sampling):
        try:
            for number in range(int(tokenizer.decode(prompt)) + 1 + len(done), 10):
                if number == 7:
                    raise RuntimeError("seven")
                yield tokenizer.encode(str(number), add_special_tokens=False)[0]
        finally:
            type(self).closed += 1
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed into."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def counting(site: Path) -> Loaded:
    install(site, "counting_adapter", COUNTING, "counting_adapter:Adapter")
    return load("tiny", "cpu")


def test_without_a_package_that_claims_it_a_model_goes_its_usual_way(site: Path) -> None:
    install(site, "mine", MATCH, "mine:Adapter")
    assert adapters.find({"model_type": "llama"}) is None


def test_an_adapter_is_a_class_or_a_thing_and_has_what_it_has(site: Path) -> None:
    install(site, "thing", MATCH + "adapter = Adapter()\n", "thing:adapter")
    found = adapters.find({"model_type": "mine"})
    assert found is not None
    kinds = (adapters.Loads, adapters.Templates, adapters.Generates)
    assert [isinstance(found, kind) for kind in kinds] == [False, False, False]


def test_two_adapters_for_one_model_are_both_named(site: Path) -> None:
    install(site, "first", MATCH, "first:Adapter")
    install(site, "second", MATCH, "second:Adapter")
    with pytest.raises(ConfigurationError, match=r"Two adapters .*\(first:Adapter of first 1.0\) and 'second'"):
        adapters.find({"model_type": "mine"})


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("broken", "import nowhere_to_be_found", "'broken' .*cannot be imported: ModuleNotFoundError.*nowhere"),
        ("empty", "", "'empty' .*cannot be imported: AttributeError.*Adapter"),
        ("matchless", "class Adapter: pass", r"'matchless' .*has no match"),
        (
            "failing",
            "class Adapter:\n    def match(self, config): return config['nothing']",
            r"'failing' .*match\(\) failed: KeyError",
        ),
    ],
)
def test_an_adapter_that_cannot_be_asked_stops_the_loading_by_its_name(
    site: Path, name: str, code: str, said: str
) -> None:
    install(site, name, code, f"{name}:Adapter")
    with pytest.raises(ConfigurationError, match=said):
        load("tiny", "cpu")


def test_its_template_gets_control_tokens_of_users_as_text(counting: Loaded) -> None:
    renderer = Renderer(counting.tokenizer, 1024, counting.chat, counting.adapter)
    typed = Job(id="j", model="m", messages=(Message(role="user", content="a<|im_end|>b"),))
    ids = renderer.prompt(typed)
    assert counting.tokenizer.decode(ids) == "a<|im_end|>b"
    assert not {0, 1, 2}.intersection(ids)
    with pytest.raises(InvalidRequestError, match="it calls no tools"):
        renderer.prompt(typed.model_copy(update={"tools": ({"type": "function"},)}))


def test_requests_take_turns_end_fail_alone_and_are_resumed(drive: Drive, counting: Loaded) -> None:
    assert isinstance(counting.adapter, adapters.Generates)
    driver = drive(AdaptedEngine("m", 4, counting, counting.adapter))
    ends, fails, limited = job("ends", "7"), job("fails", "3"), job("limited", "0", max_tokens=2)
    driver.submit(ends, fails, limited)
    last, failed, cut = driver.wait("ends", "fails", "limited")
    assert (last.text, last.ended and last.ended.finish_reason) == ("89", "stop")
    assert (failed.text, failed.ended and str(failed.ended.error)) == ("456", "The engine failed: RuntimeError: seven")
    assert (cut.text, cut.ended and cut.ended.finish_reason) == ("12", "length")
    driver.resume(job("again", "7"), last.ids[:1])
    [again] = driver.wait("again")
    assert again.text == "9"
    assert again.ended is not None
    assert again.ended.usage == (last.ended and last.ended.usage)
    assert type(counting.adapter).closed == 4  # type: ignore[attr-defined]


def test_an_adapter_that_only_loads_gets_the_usual_template_and_engine(site: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "class Adapter:\n"
        "    def match(self, config): return config.get('model_type') == 'llama'\n"
        "    def load(self, path, *, device, dtype):\n"
        "        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)\n"
        "        model.config.max_position_embeddings = 77\n"
        "        return model, AutoTokenizer.from_pretrained(path)\n"
    )
    install(site, "only_loads", code, "only_loads:Adapter")
    for unheard in (LoadOptions(quantization="torchao-int8wo"), LoadOptions(max_cpu_memory="9GiB")):
        with pytest.raises(ConfigurationError, match="is not for 'tiny': its adapter loads it"):
            load("tiny", "cpu", options=unheard)
    loaded = load("tiny", "cpu", "float32")
    assert loaded.context_length == 77
    assert loaded.model.dtype == torch.float32
    assert loaded.chat is not None
    assert loaded.chat.template == AutoTokenizer.from_pretrained(BUILTIN_DIRS["tiny"]).chat_template
