"""Streamed text is the full decode, in whole characters, and holds no part of a stop string."""

import json
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from fastchat_q.workers.engines.processing.text import MAX_HELD_TOKENS, REPLACEMENT, Detokenizer, StopMatcher
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]

TEXTS = {
    "plain": "The cat sat on the mat, and then it left.",
    "emoji": "Hello 😀 world 🎉🎉 and 🧪",
    "zwj": "family 👩‍👩‍👧‍👦 and 🏳️‍🌈 and 👩🏽‍🚀!",
    "flags": "🇩🇪🇫🇷🇯🇵 🇧🇷",
    "cjk": "日本語と中文、한국어。你好世界",
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "devanagari": "नमस्ते दुनिया, क्षत्रिय",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘ e\u0301 n\u0303",
    "leading spaces": "   three spaces",
    "white space": "\n\n\ttabs\t\tand\n  runs   \r\n of  them \n",
    "code": "def f(x):\n    return x ** 2  # ok — naïve\n",
    "mixed": "a😀b日c🇩🇪 é\tend",
    "a real replacement character": "before \ufffd after",
}
LONE_BYTES = range(0x80, 0xC0)
"""Continuation bytes: in no order do they make a character."""


class Codec:
    """A tokenizer reduced to what these tests need."""

    def __init__(self, encode: Callable[[str], list[int]], decode: Decode, byte: Callable[[int], int]) -> None:
        self.encode, self.decode, self.byte = encode, decode, byte

    def bytes(self, raw: bytes) -> list[int]:
        """One token a byte."""
        return [self.byte(value) for value in raw]

    def stream(self, ids: Sequence[int]) -> list[str]:
        """The chunks, the flushed one last."""
        detokenizer = Detokenizer(self.decode)
        return [*map(detokenizer.feed, ids), detokenizer.flush()]


def byte_level(tokenizer: PreTrainedTokenizerBase) -> Codec:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def byte(value: int) -> int:
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # GPT-2's table of bytes
        others = [b for b in range(256) if b not in printable]
        token = tokenizer.convert_tokens_to_ids(chr(value if value in printable else 256 + others.index(value)))
        assert isinstance(token, int)
        return token

    return Codec(encode, decode, byte)


def sentencepiece_style() -> Codec:
    """As Llama 2 and Gemma tokenise: spaces are a letter, what is not in the vocabulary falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    corpus = ["the quick brown fox jumps over a lazy dog, the cat sat on the mat and then it left\n\t日本"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(corpus * 3, trainer)
    plain = json.loads(tokenizer.to_str())  # the byte tokens are ordinary ones: as special ones they would be matched
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(plain))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def byte(value: int) -> int:
        token = tokenizer.token_to_id(byte_tokens[value])
        assert token is not None
        return token

    return Codec(encode, tokenizer.decode, byte)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def codec(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Codec:
    return byte_level(tokenizer) if request.param == "byte-level" else sentencepiece_style()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_text_equals_the_full_decode(codec: Codec, text: str) -> None:
    ids = codec.encode(text)
    assert "".join(codec.stream(ids)) == codec.decode(ids) == text


@pytest.mark.parametrize("text", [t for t in TEXTS.values() if REPLACEMENT not in t])
def test_no_chunk_holds_a_piece_of_a_character(codec: Codec, text: str) -> None:
    chunks = codec.stream(codec.encode(text))
    assert not any(REPLACEMENT in chunk for chunk in chunks)
    assert chunks[-1] == "", "nothing is held back once the last character is whole"


@pytest.mark.parametrize("text", ["Grüße 😀", "日本", "🇩🇪"])
def test_a_character_made_of_single_bytes_appears_with_its_last_byte(codec: Codec, text: str) -> None:
    ids = codec.bytes(text.encode())
    chunks = codec.stream(ids)
    assert "".join(chunks) == text
    ends = [len(text[:count].encode()) for count in range(1, len(text) + 1)]
    assert [i for i, chunk in enumerate(chunks, 1) if chunk] == ends


def test_a_cut_inside_a_character_shows_what_is_there_only_when_flushed(codec: Codec) -> None:
    ids = [*codec.encode("ok"), *codec.bytes("😀".encode()[:3])]
    detokenizer = Detokenizer(codec.decode)
    assert "".join(map(detokenizer.feed, ids)) == "ok"
    rest = detokenizer.flush()
    assert rest
    assert set(rest) == {REPLACEMENT}
    assert "ok" + rest == codec.decode(ids)
    assert detokenizer.flush() == "", "a second flush adds nothing"


def test_a_long_run_of_undecodable_bytes_is_held_back_for_a_few_tokens_only(codec: Codec) -> None:
    choose = random.Random(0)
    detokenizer = Detokenizer(codec.decode)
    shown = 0
    for count in range(1, 301):
        shown += len(detokenizer.feed(codec.byte(choose.choice(LONE_BYTES))))
        assert count - shown <= MAX_HELD_TOKENS + 1
    assert shown + len(detokenizer.flush()) == 300


@pytest.mark.parametrize("garbage", range(1, 25))
def test_a_character_after_undecodable_bytes_is_not_lost(tokenizer: PreTrainedTokenizerBase, garbage: int) -> None:
    codec = byte_level(tokenizer)  # a byte-fallback decoder gives up the whole run of bytes, the character included
    ids = [*codec.bytes(b"\x80" * garbage), *codec.bytes("😀".encode()), *codec.encode(" fine")]
    text = REPLACEMENT * garbage + "😀 fine"
    assert codec.decode(ids) == text
    assert "".join(codec.stream(ids)) == text


def test_the_decoded_window_stays_short_whatever_the_tokens_are(tokenizer: PreTrainedTokenizerBase) -> None:
    codec = byte_level(tokenizer)
    silent = tokenizer.convert_tokens_to_ids("<|im_end|>")  # a special token: it decodes to nothing
    assert isinstance(silent, int)
    widths: list[int] = []

    def decode(ids: list[int]) -> str:
        widths.append(len(ids))
        return codec.decode(ids)

    detokenizer = Detokenizer(decode)
    ids = [*codec.encode("before"), *[silent] * 500, *codec.encode(" and after"), *codec.bytes(b"\x80" * 500)]
    text = "".join(map(detokenizer.feed, ids)) + detokenizer.flush()
    assert text == "before and after" + REPLACEMENT * 500
    assert max(widths) <= 4 * MAX_HELD_TOKENS, "the cost of a token does not grow with the answer"


def pieces(text: str, choose: random.Random) -> Iterator[str]:
    """The text in random chunks of 0 to 4 characters."""
    at = 0
    while at < len(text):
        size = choose.randint(0, 4)
        yield text[at : at + size]
        at += size


def match(stop: Sequence[str], chunks: Sequence[str]) -> tuple[str, bool]:
    """(everything that was shown, whether it stopped)."""
    matcher = StopMatcher(stop)
    shown = ""
    for chunk in chunks:
        text, stopped = matcher.feed(chunk)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def oracle(stop: Sequence[str], text: str) -> tuple[str, bool]:
    """Character by character: the stop string that is complete first wins; of several, the one that began first."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@pytest.mark.parametrize(
    ("stop", "chunks", "shown"),
    [
        (["STOP"], ["go S", "T", "OP on"], "go "),
        (["aab"], ["a", "a", "a", "b"], "a"),
        (["abab"], ["ab", "ac", "ab", "ab!"], "abac"),
        (["xyz", "b"], ["abc xyz"], "a"),
        (["end", "ending"], ["the end", "ing"], "the "),
        (["ending", "end"], ["the e", "nding"], "the "),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo"),
        (["日本"], ["go 日", "本 on"], "go "),
        (["abcd", "bc"], ["abcd"], "a"),
        (["abcd", "bc"], ["a", "b", "c", "d"], "a"),
    ],
)
def test_text_before_a_stop_string_is_shown_and_nothing_after(stop: list[str], chunks: list[str], shown: str) -> None:
    assert match(stop, chunks) == (shown, True)


def test_text_that_may_become_a_stop_string_waits_and_comes_out_when_it_does_not() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("a <e") == ("a ", False)
    assert matcher.feed("n") == ("", False)
    assert matcher.feed("try") == ("<entry", False)


def test_text_that_waits_when_generation_ends_is_flushed_once() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("a <en") == ("a ", False)
    assert matcher.flush() == "<en"
    assert matcher.flush() == ""


def test_without_stop_strings_nothing_waits() -> None:
    matcher = StopMatcher(["", ""])
    assert matcher.feed("a <e") == ("a <e", False)
    assert matcher.flush() == ""


def test_no_chunking_changes_what_is_shown() -> None:
    choose = random.Random(1)
    stopped = 0
    for _ in range(4000):
        stop = ["".join(choose.choices("ab日", k=choose.randint(1, 5))) for _ in range(choose.randint(1, 4))]
        text = "".join(choose.choices("ab日c", k=choose.randint(0, 24)))
        chunks = list(pieces(text, choose))
        expected = oracle(stop, text)
        assert match(stop, chunks) == expected, (stop, chunks)
        stopped += expected[1]
    assert 500 < stopped < 3900, "both cases are tried"


def test_no_part_of_a_stop_string_that_comes_is_ever_shown() -> None:
    choose = random.Random(2)
    for _ in range(1000):
        stop = ["".join(choose.choices("ab", k=choose.randint(2, 6))) for _ in range(choose.randint(1, 3))]
        text = "".join(choose.choices("ab", k=30))
        cut, stopped = oracle(stop, text)
        if not stopped:
            continue
        matcher, shown = StopMatcher(stop), ""
        for chunk in pieces(text, choose):
            new, done = matcher.feed(chunk)
            shown += new
            assert cut.startswith(shown), (stop, text, "more was shown than stands before the stop string")
            if done:
                break
        assert shown == cut
