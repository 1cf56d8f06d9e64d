"""Small random encoders as checkpoints, with a tokenizer of words, and what plain transformers says of them.

The weights are spread widely, so that what a text says and how long it is moves its vector far.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

WORDS = [f"w{n}" for n in range(500)]
VOCABULARY = 512
POSITIONS = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
ROBERTA = {**SIZES, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, pad_token_id=1),
    "roberta": lambda: transformers.RobertaConfig(**ROBERTA),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**ROBERTA),
    "mpnet": lambda: transformers.MPNetConfig(**ROBERTA),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=16, pad_token_id=1, cls_token_id=0, sep_token_id=2, bos_token_id=0, eos_token_id=2
    ),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=8),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1
    ),
    "fnet": lambda: transformers.FNetConfig(
        **{name: value for name, value in SIZES.items() if name != "num_attention_heads"}, pad_token_id=1
    ),
}
CAUSAL = ("qwen2", "qwen3")


def checkpoint(
    folder: Path,
    name: str,
    *,
    labels: int | None = None,
    pooling: str | None = None,
    normalise: bool = True,
    dense: int | None = None,
    prompts: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """Saves a random model and its tokenizer.

    Args:
        labels: of a classifier; None: an encoder.
        pooling: writes the files of sentence-transformers: ``mean_tokens``, ``cls_token``, ``lasttoken``.
        dense: the size of a dense layer behind the pooling.
        changes: to its config.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    auto: Any = AutoModel
    if labels is not None:
        config.num_labels, auto = labels, AutoModelForSequenceClassification
    elif name == "t5":
        auto = transformers.AutoModelForTextEncoding
    model = auto.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "classifier" not in key and "score" not in key:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer(causal=name in CAUSAL).save_pretrained(folder)
    if pooling is not None:
        _sentence_files(folder, pooling, normalise, dense, prompts or {})
    return folder


def tokenizer(*, causal: bool) -> PreTrainedTokenizerFast:
    """Words to ids; encoders get a token around each text and between a pair, decoders one at the end."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = "" if causal else "<s> "
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>",
        pair=f"{start}$A </s> $B:1 </s>:1",
        special_tokens=[(token, vocabulary[token]) for token in special],
    )
    inputs = ["input_ids", "attention_mask"] + ([] if causal else ["token_type_ids"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token=None if causal else "<s>",
        sep_token="</s>",
        model_input_names=inputs,
    )


def text(length: int, seed: int = 0) -> str:
    """So many words."""
    return " ".join(WORDS[n - 4] for n in tokens(length, seed))


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    """The same as ids."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(4, len(WORDS) + 4, (length,), generator=generator).tolist())


class Reference:
    """sentence-transformers' computation, written plainly: one text at a time, no padding."""

    def __init__(self, folder: Path, pooling: str, *, normalise: bool = True) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto: Any = transformers.AutoModelForTextEncoding if config.model_type == "t5" else AutoModel
        self.model = auto.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._pooling, self._normalise = pooling, normalise

    @torch.inference_mode()
    def __call__(self, one: str | tuple[int, ...]) -> torch.Tensor:
        ids = self.tokenizer(one)["input_ids"] if isinstance(one, str) else list(one)
        hidden = self.model(input_ids=torch.tensor([ids]))[0][0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[self._pooling]
        return torch.nn.functional.normalize(vector, dim=0) if self._normalise else vector


@torch.inference_mode()
def reference_scores(folder: Path, query: str, documents: list[str]) -> list[float]:
    """The logits of a cross-encoder, one pair at a time."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words: Any = AutoTokenizer.from_pretrained(folder)
    found = [model(**words(query, document, return_tensors="pt")).logits.item() for document in documents]
    return [float(score) for score in found]


def _sentence_files(folder: Path, pooling: str, normalise: bool, dense: int | None, prompts: dict[str, str]) -> None:
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (dense is not None) + ["Normalize"] * normalise
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config = {"word_embedding_dimension": 32, "include_prompt": True}
    config |= {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if prompts:
        said = {"prompts": prompts, "default_prompt_name": None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    if dense is not None:
        from safetensors.torch import save_file

        (folder / "2_Dense").mkdir()
        name = "torch.nn.modules.activation.Tanh"
        layer = {"in_features": 32, "out_features": dense, "bias": True, "activation_function": name}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(layer))
        weights = {"linear.weight": torch.randn(dense, 32), "linear.bias": torch.randn(dense)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
