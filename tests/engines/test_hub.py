"""Models from the hub: what is downloaded, how it is told, and what is said when it cannot be had."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.loading.model import load
from fastchat_q.workers.engines.loading.plan import plan
from huggingface_hub import constants

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import ConfigurationError

from .fake_hub import Hub, hub

TINY = BUILTIN_DIRS["tiny"]


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, in place of huggingface.co; with an empty cache."""
    with hub() as ours:
        folder = tmp_path / "repo"
        shutil.copytree(TINY, folder)
        (folder / "README.md").write_text("read me")
        (folder / "pytorch_model.bin").write_bytes(b"a pickle of the same")
        (folder / "consolidated.safetensors").write_bytes(b"the same once more")
        (folder / "modeling_x.py").write_text("raise SystemExit")
        ours.folders["us/tiny"] = folder
        use(monkeypatch, ours.url, tmp_path / "cache")
        yield ours


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_model_is_downloaded_once_without_what_is_not_needed_and_runs(web: Hub) -> None:
    told: list[tuple[float, str]] = []
    loaded = load("us/tiny", "cpu", on_progress=lambda fraction, phase: told.append((fraction, phase)))
    assert loaded.tokenizer.chat_template is not None
    fetched = {path.rpartition("/")[2] for path in web.asked if "/resolve/" in path}
    assert fetched == {path.name for path in TINY.iterdir()}
    downloads = [fraction for fraction, phase in told if phase == "download"]
    loads = [fraction for fraction, phase in told if phase == "load"]
    assert downloads == sorted(downloads)
    assert downloads[-1] == 1.0
    assert loads == sorted(loads)
    assert len(loads) > 5
    assert loads[-1] == 1.0
    web.asked.clear()
    load("us/tiny", "cpu")
    assert not [path for path in web.asked if path.endswith(".safetensors")]


def test_a_model_in_the_cache_loads_when_the_hub_is_away(
    web: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("us/tiny", "cpu")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert load("us/tiny", "cpu").context_length


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:9 cannot be reached .* Name a local folder"):
        load("us/tiny", "cpu")


TROUBLE: dict[str, tuple[int, str, str]] = {
    "gated": (403, "GatedRepo", r"it is gated\. Accept its terms at http.*/us/tiny .*no token \(set HF_TOKEN"),
    "gated for all": (401, "GatedRepo", r"it is gated"),
    "private or missing": (401, "RepoNotFound", r"has no model 'us/tiny', or it is private.*HF_TOKEN"),
    "missing": (404, "RepoNotFound", r"has no model 'us/tiny', or it is private"),
    "too many requests": (429, "", "the hub answered 429"),
}


@pytest.mark.parametrize(("status", "code", "says"), TROUBLE.values(), ids=TROUBLE.keys())
def test_what_the_hub_refuses_is_told_with_what_to_do(web: Hub, status: int, code: str, says: str) -> None:
    web.trouble["us/tiny"] = (status, code)
    with pytest.raises(ConfigurationError, match=says) as refused:
        load("us/tiny", "cpu")
    assert "\n" not in refused.value.message


def test_a_revision_is_taken_or_refused_by_name(web: Hub) -> None:
    assert load("us/tiny", "cpu", options=LoadOptions(revision="v1")).context_length
    with pytest.raises(ConfigurationError, match=r"has no revision 'v9'"):
        load("us/tiny", "cpu", options=LoadOptions(revision="v9"))


def test_a_name_that_is_none_is_told_as_such(web: Hub) -> None:
    with pytest.raises(ConfigurationError, match="neither a folder on this machine nor a name on the hub"):
        load("us--/..tiny", "cpu")


def test_pickled_weights_are_refused_before_a_byte_of_them_is_fetched(web: Hub) -> None:
    folder = web.folders["us/tiny"]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"only pickled weights \(pytorch_model\.bin\).*--allow-pickle"):
        load("us/tiny", "cpu")
    assert not [path for path in web.asked if "/resolve/" in path]


def test_pickled_weights_load_when_that_is_asked_for(web: Hub) -> None:
    from safetensors.torch import load_file

    folder = web.folders["us/tiny"]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    loaded = load("us/tiny", "cpu", options=LoadOptions(allow_pickle=True))
    assert sum(p.numel() for p in loaded.model.parameters()) == 1_697_472


def test_a_plan_of_a_model_on_the_hub_fetches_headers_and_no_weights(web: Hub) -> None:
    (web.folders["us/tiny"] / "consolidated.safetensors").unlink()
    found = plan("us/tiny", "cpu", "auto", LoadOptions(), slots=1)
    assert found.parameters == 1_697_472
    assert found.stored == 1_697_472 * 2
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.safetensors"))


@pytest.fixture
def fine_tune(web: Hub) -> Hub:
    """The model has no template of its own, and its card names Vicuna as what it was made of."""
    folder = web.folders["us/tiny"]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    entries = json.loads((folder / "tokenizer_config.json").read_text())
    entries.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    (folder / "README.md").write_text("---\nbase_model: lmsys/vicuna-7b-v1.5\n---\nA fine-tune.\n")
    return web


def test_the_card_of_a_model_on_the_hub_names_its_family(fine_tune: Hub) -> None:
    chat = load("us/tiny", "cpu", options=LoadOptions(revision="v1")).chat
    assert chat is not None
    assert (chat.family.name, chat.why) == ("vicuna_v1.1", "the model names the family")
    assert next(path for path in fine_tune.asked if path.endswith("README.md")) == "/us/tiny/resolve/v1/README.md"


def test_a_card_that_was_fetched_once_counts_when_the_hub_is_away(
    fine_tune: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("us/tiny", "cpu")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    chat = load("us/tiny", "cpu").chat
    assert chat is not None
    assert chat.family.name == "vicuna_v1.1"


def test_a_template_that_was_asked_for_needs_no_card(fine_tune: Hub) -> None:
    load("us/tiny", "cpu", options=LoadOptions(chat_template="zephyr"))
    assert not [path for path in fine_tune.asked if path.endswith("README.md")]


def test_a_model_without_template_and_card_takes_no_chats_and_says_the_ways_out(
    fine_tune: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (fine_tune.folders["us/tiny"] / "README.md").unlink()
    assert not load("us/tiny", "cpu").takes_chats
    assert re.search(r"no chat template.*Ways out: --chat-template NAME", capsys.readouterr().out)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
print("REMOTE CODE RAN")
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A checkpoint whose architecture is Python code beside it."""
    folder = tmp_path / "odd"
    shutil.copytree(TINY, folder)
    (folder / "odd.py").write_text(REMOTE)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_checkpoint_is_not_run_and_the_option_is_named(odd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"Python code that comes with the checkpoint.*--trust-remote-code"):
        load(str(odd), "cpu")
    assert "REMOTE CODE RAN" not in capfd.readouterr().out


def test_code_of_a_checkpoint_runs_when_it_is_trusted(odd: Path, tmp_path: Path) -> None:
    code = (
        "from fastchat_q.workers.engines.loading.model import load\nfrom fastchat_q.choices import LoadOptions\n"
        f"print(type(load({str(odd)!r}, 'cpu', options=LoadOptions(trust_remote_code=True)).model).__name__)"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "REMOTE CODE RAN" in ran.stdout, ran.stderr
    assert "OddForCausalLM" in ran.stdout
