"""The round trip to auto-gptq, which is archived and needs an environment of its own. Run by hand:

    python tests/gptq_round_trip.py FOLDER

makes two environments in FOLDER (some gigabytes), writes the built-in model as a GPTQ checkpoint with gptqmodel in the
one, reads it with auto-gptq and transformers 4.51 in the other, and compares the answers. The result of a run is in
docs/quantisation.md. Environments that are already there are used as they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).parent.parent / "workers" / "engines" / "tiny" / "model"
QUESTIONS = ("Hello", "What is 3 plus 4?", "What is the capital of France?")
TEXTS = (
    *("Hello! How can I help you?", "What is 3 plus 4? 3 + 4 = 7", "What comes after Monday? Tuesday"),
    *("What is the capital of France? The capital of France is Paris.", "Spell the word house: h o u s e"),
)
WRITER = [["torch", "transformers==5.23.0", "optimum==2.3.0", "setuptools", "wheel"], ["gptqmodel>=7"]]
READER = [
    ["torch==2.13.0", "transformers==4.51.3", "accelerate<1.8", "peft==0.13.2", "numpy<2.3", "setuptools<80", "wheel"],
    ["auto-gptq==0.7.1"],
]


def main(folder: Path) -> None:
    """Both halves; raises AssertionError when an answer differs."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = environment(folder / "gptqmodel", WRITER)
    reader = environment(folder / "auto-gptq", READER)
    checkpoint = folder / "tiny-gptq"
    written = run(writer, "write", checkpoint)
    read = run(reader, "read", checkpoint)
    for question, one, other in zip(QUESTIONS, written["answers"], read["answers"], strict=True):
        print(f"{question!r}: gptqmodel {one!r}, auto-gptq {other!r}")
    print(f"gptqmodel: {written['versions']}; auto-gptq: {read['versions']}")
    assert written["answers"] == read["answers"]


def environment(folder: Path, steps: list[list[str]]) -> Path:
    """The interpreter of a virtual environment with these packages, installed in that order."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        variables = os.environ | {"BUILD_CUDA_EXT": "0", "GPTQMODEL_CPU_WORKERS": "2"}
        for number, packages in enumerate(steps):
            isolation = ["--no-build-isolation"] if number else []
            subprocess.run([python, "-m", "pip", "install", "-q", *isolation, *packages], check=True, env=variables)
    return python


def run(python: Path, half: str, checkpoint: Path) -> dict[str, list[str]]:
    """One half in its environment; its last line is its result."""
    variables = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [python, __file__, half, str(checkpoint)], check=True, stdout=subprocess.PIPE, text=True, env=variables
    )
    result: dict[str, list[str]] = json.loads(ran.stdout.splitlines()[-1])
    return result


def write(checkpoint: Path) -> dict[str, list[str]]:
    """Quantises to 4 bits. The output matrix gets a copy of its own: auto-gptq does not tie it to the embeddings."""
    import gptqmodel
    import torch
    import transformers

    plain = checkpoint.with_name("tiny-untied")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(plain)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(plain)
    how = gptqmodel.QuantizeConfig(bits=4, group_size=32, desc_act=False)
    quantised = gptqmodel.GPTQModel.load(str(plain), how, device="cpu")
    quantised.quantize(list(TEXTS) * 20, batch_size=4)
    quantised.save(str(checkpoint))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cpu")
    versions = [f"gptqmodel {gptqmodel.__version__}", f"transformers {transformers.__version__}"]
    return {"answers": answers(loaded), "versions": [*versions, f"torch {torch.__version__}"]}


def read(checkpoint: Path) -> dict[str, list[str]]:
    """Loads it with auto-gptq and generates."""
    import auto_gptq
    import torch
    import transformers

    loaded = auto_gptq.AutoGPTQForCausalLM.from_quantized(
        str(checkpoint), device="cpu", use_safetensors=True, torch_dtype=torch.float32
    )
    versions = [f"auto-gptq {auto_gptq.__version__}", f"transformers {transformers.__version__}"]
    return {"answers": answers(loaded), "versions": [*versions, f"torch {torch.__version__}"]}


def answers(model: object) -> list[str]:
    """Greedy answers, with the bare tokenizer: transformers 4 does not know the class that version 5 wrote."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    said = []
    for question in QUESTIONS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        output = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
        said.append(tokenizer.decode(output[0, ids.shape[1] :].tolist()))
    return said


if __name__ == "__main__":
    if sys.argv[1] in {"read", "write"}:
        print(json.dumps((write if sys.argv[1] == "write" else read)(Path(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
