"""A model that cannot be loaded is a ConfigurationError that says which, why and what to do; never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.loading import model as loading
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.loading.devices import pick_device
from fastchat_q.workers.engines.loading.model import Loaded, load

from fastchat_q.choices import Dtype
from fastchat_q.errors import ConfigurationError
from fastchat_q.models import served_name

Change = Callable[[Path], object]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the built-in model, to be broken."""
    folder = tmp_path / "my-model"
    shutil.copytree(BUILTIN_DIRS["tiny"], folder)
    return folder


def configure(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(name: str, size: int) -> Change:
    """Keeps the first bytes of a file, as an interrupted download does."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return change


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Change, str]] = {
    "no weights": (remove("model.safetensors"), r"no file named model\.safetensors"),
    "weights as a pickle": (pickled, r"only pickled weights .*--allow-pickle"),
    "weights cut short": (
        cut("model.safetensors", 100_000),
        r"model\.safetensors is cut short: 100,000 of 3,398,976",
    ),
    "weights that are a Git LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "weights of another shape": (configure(hidden_size=96), "mismatch"),
    "weights of fewer layers": (configure(num_hidden_layers=6), r"no weights for .*model\.layers\.4"),
    "no config": (remove("config.json"), "config.json"),
    "a config cut short": (cut("config.json", 100), "not a valid JSON"),
    "a config of the wrong type": (configure(hidden_size="wide"), "hidden_size"),
    "an unknown architecture": (configure(model_type="nonsense"), "nonsense"),
    "an architecture that is no causal LM": (configure(model_type="vit"), "ViTConfig"),
    "an unknown rope": (configure(rope_parameters={"rope_type": "nonsense"}), "nonsense"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer.*sentencepiece"),
    "a tokenizer cut short": (cut("tokenizer.json", 1000), "JSON file of it is broken"),
}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_refused_with_its_reason(checkpoint: Path, change: Change, reason: str) -> None:
    change(checkpoint)
    with pytest.raises(ConfigurationError) as refused:
        load(str(checkpoint), device="cpu")
    assert str(checkpoint) in refused.value.message
    assert refused.match(reason)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such-folder", "../a/b", "~/models/x", "a/b/c"])
def test_a_folder_that_is_not_there_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="there is no such folder") as refused:
        load(source, device="cpu")
    assert source in refused.value.message


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"'npu' is not available .* sees only .*cpu"):
        pick_device("npu")


def test_the_cpu_and_a_device_of_its_own_choice_are_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps", "xpu", "npu"}


@pytest.mark.parametrize(
    ("own", "asked", "got"),
    [
        ("float16", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        (None, "auto", torch.float32),
        ("float16", "bfloat16", torch.bfloat16),
        ("float16", "float16", torch.float16),
    ],
)
def test_a_half_precision_checkpoint_is_float32_on_a_cpu_unless_asked(
    checkpoint: Path, own: str | None, asked: Dtype, got: torch.dtype
) -> None:
    configure(dtype=own)(checkpoint)
    assert load(str(checkpoint), device="cpu", dtype=asked).model.dtype == got


def test_the_built_in_model_says_what_an_engine_must_know(tiny: Loaded) -> None:
    config = tiny.model.config
    assert tiny.device == torch.device("cpu")
    assert tiny.model.dtype == torch.float32
    assert tiny.context_length == config.max_position_embeddings
    assert tiny.eos_ids == {tiny.tokenizer.eos_token_id}
    assert len(tiny.tokenizer) <= config.vocab_size
    assert not tiny.model.training


@pytest.mark.parametrize(("eos", "expected"), [(7, {7}), ([2, 7], {2, 7}), (None, {2})])
def test_generation_ends_at_the_ids_of_the_generation_config_or_else_of_the_tokenizer(
    checkpoint: Path, eos: int | list[int] | None, expected: set[int]
) -> None:
    configure(eos_token_id=None)(checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load(str(checkpoint), device="cpu").eos_ids == expected


def test_the_served_name_is_the_hub_id_or_the_last_part_of_the_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served_name("tiny") == "tiny"
    assert served_name("org/Some-Model") == "org/Some-Model"
    assert served_name(str(checkpoint)) == "my-model"
    assert served_name(f"{checkpoint}/") == "my-model"
    monkeypatch.chdir(checkpoint)
    assert served_name(".") == "my-model"


def test_a_folder_of_that_name_does_not_hide_the_built_in_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert served_name("tiny") == "tiny"
    assert load("tiny", device="cpu").context_length


def test_settings_of_a_checkpoint_that_are_not_applied_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = loading.load("tiny", "cpu")
    loaded.model.generation_config.repetition_penalty = 1.3
    loading._warn_of_ignored_settings("tiny", loaded.model)
    assert "repetition_penalty" in capsys.readouterr().out
    loaded.model.generation_config.repetition_penalty = 1.0
    loading._warn_of_ignored_settings("tiny", loaded.model)
    assert capsys.readouterr().out == ""
