"""Makes the model that engines are compared on: a random Llama of 7.3 M parameters with a tokenizer and a template.

    python bench/tiny_llama.py FOLDER

4 layers, hidden size 256, 8,192 tokens, float32, from a fixed seed. Any engine that reads a Hugging Face folder serves
it. Its text means nothing; its speed is that of a model whose cost is all overhead, which
is what shows what a server adds.
"""

import argparse
import json
from pathlib import Path

VOCABULARY = 8192
CONTEXT = 2048
END, BEGIN = "<|end|>", "<|begin|>"
TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def make(folder: Path) -> Path:
    """Writes the model into a folder unless it is there already; returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # spread widely enough for answers that are not one token for ever
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)
    model.float().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    _spell_for_older_releases(folder)
    return folder


def _spell_for_older_releases(folder: Path) -> None:
    """transformers 4 knows neither the new name of the tokenizer's class nor merges that are pairs."""
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _tokenizer():  # type: ignore[no-untyped-def]  # transformers is not there for the static check
    """Byte-level BPE over words that are made up: 256 bytes, and merges that join them pair by pair."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(END, special=True), AddedToken(BEGIN, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_words(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, chat_template=TEMPLATE, model_max_length=CONTEXT
    )


def _words() -> list[str]:
    """Words of two to four syllables, alike on every machine."""
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    count, state, words = 20_000, 1, []
    for _ in range(count):
        word = ""
        state = (state * 1103515245 + 12345) % 2**31
        for _ in range(2 + state // 7 % 3):
            state = (state * 1103515245 + 12345) % 2**31
            word += syllables[state // 65536 % len(syllables)]
        words.append(word)
    benchmark = " ".join(f"word{n} user assistant system" for n in range(100))  # what prompts of benchmarks are made of
    return [benchmark] * 5 + [" ".join(words[i : i + 20]) for i in range(0, count, 20)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))


if __name__ == "__main__":
    main()
