"""Each way to have fewer bits per weight, tried on the built-in model as far as it runs without a GPU.

A method whose package is not here is skipped with its name; CI installs all but gptqmodel (docs/quantisation.md).
"""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fastchat_q.workers.engines.loading import quantization
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.loading.model import Loaded, load
from fastchat_q.workers.engines.loading.plan import plan

from fastchat_q.choices import Dtype, LoadOptions, Quantization
from fastchat_q.errors import ConfigurationError

from .quantised import write_compressed, write_gguf
from .tensors import bytes_of

QUESTIONS = {
    "Hello": "Hello! How can I help you?",
    "What is 3 plus 4?": "3 + 4 = 7",
    "What is the capital of France?": "The capital of France is Paris.",
}
ON_THE_FLY: list[tuple[Quantization, str]] = [
    ("bitsandbytes-8bit", "bitsandbytes"),
    ("bitsandbytes-4bit", "bitsandbytes"),
    ("torchao-int8wo", "torchao"),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # of optimum
]


def answers(loaded: Loaded) -> list[str]:
    """Greedy answers to the three questions."""
    said = []
    for question in QUESTIONS:
        prompt = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = prompt["input_ids"]
        output = loaded.model.generate(**prompt, max_new_tokens=24, do_sample=False)
        said.append(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "package"), ON_THE_FLY, ids=[m for m, _ in ON_THE_FLY])
def test_a_model_that_is_quantised_while_loading_still_answers(
    method: Quantization, package: str, dtype: Dtype
) -> None:
    pytest.importorskip(package)
    loaded = load("tiny", "cpu", dtype, LoadOptions(quantization=method))
    assert answers(loaded) == list(QUESTIONS.values())
    planned = plan("tiny", "cpu", dtype, LoadOptions(quantization=method), slots=1)
    assert planned.asked.weights == pytest.approx(bytes_of(loaded.model), rel=0.03)
    assert planned.asked.weights < plan("tiny", "cpu", dtype, LoadOptions(), slots=1).asked.weights * 0.6


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_a_compressed_tensors_checkpoint_loads_and_answers(tmp_path: Path, bits: int, group: int | None) -> None:
    pytest.importorskip("compressed_tensors")
    write_compressed(tmp_path, bits, group)
    for choice in ("auto", "compressed-tensors"):
        loaded = load(str(tmp_path), "cpu", "float32", LoadOptions(quantization=choice))
        assert answers(loaded) == list(QUESTIONS.values())


def test_a_gguf_file_loads_with_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny-q8_0.gguf")
    loaded = load(str(tmp_path / "tiny-q8_0.gguf"), "cpu", "float32")
    assert loaded.context_length == 1024
    assert answers(loaded) == list(QUESTIONS.values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel leaves a folder to the end
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel needs an environment of its own")
def test_a_gptq_checkpoint_loads_and_answers(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "gptq_round_trip.py"
    subprocess.run(
        [sys.executable, str(script), "write", str(tmp_path / "gptq")], check=True, capture_output=True, timeout=250
    )
    folder = str(tmp_path / "gptq")
    loaded = load(folder, "cpu")
    assert answers(loaded) == list(QUESTIONS.values())
    assert plan(folder, "cpu", "auto", LoadOptions(), 1).asked.weights == pytest.approx(bytes_of(loaded.model), rel=0.1)


MISSING: dict[str, tuple[dict[str, object], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"gptqmodel.*pip install 'fastchat-q\[gptq\]'"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"gptqmodel.*pip install 'fastchat-q\[gptq\]'"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        r"compressed_tensors.*pip install 'fastchat-q\[quantization\]'",
    ),
    "bitsandbytes": (
        {"load_in_4bit": True, "quant_method": "bitsandbytes"},
        r"bitsandbytes.*pip install 'fastchat-q\[quantization\]'",
    ),
}


@pytest.mark.parametrize(("own", "says"), MISSING.values(), ids=MISSING.keys())
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, object], says: str
) -> None:
    folder = quantised_by(tmp_path, own)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=says):
        load(str(folder), "cpu")


def quantised_by(tmp_path: Path, own: dict[str, object]) -> Path:
    """A checkpoint that says so of itself."""
    folder = tmp_path / "quantised"
    shutil.copytree(BUILTIN_DIRS["tiny"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("asked", ["bitsandbytes-4bit", "torchao-int8wo", "awq", "none"])
def test_a_checkpoint_is_not_quantised_twice(tmp_path: Path, asked: Quantization) -> None:
    folder = quantised_by(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(ConfigurationError, match=r"quantised already \(gptq\): leave out --quantization"):
        load(str(folder), "cpu", options=LoadOptions(quantization=asked))


@pytest.mark.parametrize("asked", ["gptq", "awq", "compressed-tensors", "gguf"])
def test_a_kind_of_checkpoint_is_not_made_from_a_plain_one(asked: Quantization) -> None:
    with pytest.raises(ConfigurationError, match=r"is for checkpoints of that kind.*quantise while loading"):
        load("tiny", "cpu", options=LoadOptions(quantization=asked))


def test_a_method_that_does_not_run_on_a_device_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError, match=r"torchao-int4wo does not run on cpu, only on cuda\. There: bits"):
        load("tiny", "cpu", options=LoadOptions(quantization="torchao-int4wo"))
    config = load("tiny", "cpu").model.config
    with pytest.raises(ConfigurationError, match="bitsandbytes-4bit does not run on mps"):
        quantization.choose("bitsandbytes-4bit", "x", config, torch.device("mps"))
