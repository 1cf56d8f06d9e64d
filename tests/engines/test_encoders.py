"""Embeddings and rankings against plain transformers, one input at a time; alone and in batches of all lengths."""

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.encoding import models as encoders
from fastchat_q.workers.engines.encoding.engine import EncoderEngine
from fastchat_q.workers.engines.loading import model as loading

from fastchat_q.choices import EncoderOptions
from fastchat_q.errors import ConfigurationError, FastchatQError
from fastchat_q.events import Piece, Usage
from fastchat_q.jobs import Job

from .conftest import Drive
from .driving import Answer
from .random_encoders import CAUSAL, POSITIONS, Reference, checkpoint, reference_scores, text, tokens

TOLERANCE = 1e-6
"""Of float32 on a CPU: how far a number of a unit vector may be from that of another batch."""
LENGTHS = [1, 2, 3, 5, 8, 13, 14, 15, 21, 34, 55, 90, 100, 110]
ENCODERS = ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "qwen2", "qwen3", "t5"]
DEFAULT = EncoderOptions()


def embedder(folder: Path, options: EncoderOptions = DEFAULT, **load: Any) -> encoders.Embedder:
    return encoders.Embedder(str(folder), loading.load_encoder(str(folder), "embed", device="cpu", **load), options)


def ranker(folder: Path) -> encoders.Ranker:
    return encoders.Ranker(str(folder), loading.load_encoder(str(folder), "rerank", device="cpu"))


def engine(computer: encoders.Computer, batch_tokens: int | None = None) -> EncoderEngine:
    return EncoderEngine("m", 16, computer, batch_tokens)


def embed(job_id: str, *inputs: str | tuple[int, ...], dimensions: int | None = None) -> Job:
    return Job(id=job_id, model="m", kind="embed", inputs=inputs, dimensions=dimensions)


def rerank(job_id: str, query: str, *documents: str) -> Job:
    return Job(id=job_id, model="m", kind="rerank", query=query, inputs=documents)


def numbers(piece: Piece) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(piece.vector)), dtype=torch.float32)


def vectors(answer: Answer) -> list[torch.Tensor]:
    assert answer.finish_reason == "stop"
    assert all(piece.units == 1 for piece in answer.pieces)
    pieces = sorted(answer.pieces, key=lambda piece: piece.choice)
    assert [piece.choice for piece in pieces] == list(range(len(pieces)))
    return [numbers(piece) for piece in pieces]


def error(answer: Answer) -> FastchatQError:
    assert answer.ended is not None
    assert answer.ended.error is not None
    return answer.ended.error


def assert_close(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.stack(list(got)), torch.stack(list(expected)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_those_of_plain_transformers_whatever_shares_the_batch(
    name: str, tmp_path: Path, drive: Drive
) -> None:
    pooling = "lasttoken" if name in CAUSAL else "mean_tokens" if name in ("bert", "xlm-roberta", "t5") else "cls_token"
    folder = checkpoint(tmp_path / name, name, pooling=pooling)
    reference = Reference(folder, {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}[pooling])
    made_of: Any = tokens if name == "qwen2" else text  # whose tokenizer transformers rebuilds as one of bytes
    texts = [made_of(length, seed) for length in LENGTHS for seed in range(3)]
    expected = [reference(one) for one in texts]
    assert min(torch.dist(expected[0], one) for one in expected[1:]) > 0.01, "the texts are told apart"
    made = engine(embedder(folder))
    assert made._computer.pads, "batches have inputs of several lengths"
    driver = drive(made)
    together = driver.run(*(embed(f"j{n}", *texts[n::4]) for n in range(4)))
    for n, answer in enumerate(together):
        assert_close(vectors(answer), expected[n::4])
    assert made.steps < len(texts), "inputs shared batches"
    [alone] = driver.run(embed("alone", texts[10]))
    assert_close(vectors(alone), [expected[10]])


def test_a_model_that_heeds_no_mask_gets_batches_of_one_length(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "fnet", "fnet", pooling="mean_tokens")
    made = engine(embedder(folder))
    assert not made._computer.pads
    texts = [text(length, seed) for length in (3, 4, 5) for seed in range(3)]
    reference = Reference(folder, "mean")
    [answer] = drive(made).run(embed("j", *texts))
    assert_close(vectors(answer), [reference(one) for one in texts])


@pytest.mark.parametrize(("name", "pooling"), [("bert", "mean"), ("roberta", "mean"), ("qwen3", "last")])
def test_without_files_that_say_so_pooling_goes_by_what_tokens_see(
    name: str, pooling: str, tmp_path: Path, drive: Drive, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "m", name)
    made = engine(embedder(folder))
    assert "--pooling" in "".join(capfd.readouterr())
    [answer] = drive(made).run(embed("j", text(7)))
    assert_close(vectors(answer), [Reference(folder, pooling)(text(7))])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_can_be_chosen(pooling: Any, tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    driver = drive(engine(embedder(folder, EncoderOptions(pooling=pooling))))
    texts = [text(length) for length in (4, 9, 11)]
    [answer] = driver.run(embed("j", *texts))
    assert_close(vectors(answer), [Reference(folder, pooling)(one) for one in texts])


def test_a_checkpoint_without_a_normalise_module_keeps_its_lengths(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="cls_token", normalise=False)
    [answer] = drive(engine(embedder(folder))).run(embed("j", text(5), dimensions=8))
    [vector] = vectors(answer)
    torch.testing.assert_close(vector, Reference(folder, "cls", normalise=False)(text(5))[:8], rtol=1e-5, atol=1e-5)
    assert vector.norm() > 1.5


def test_dense_layers_stand_behind_the_pooling(tmp_path: Path, drive: Drive) -> None:
    from safetensors.torch import load_file

    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens", dense=20)
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    pooled = Reference(folder, "mean", normalise=False)(text(6))
    expected = torch.tanh(weights["linear.weight"] @ pooled + weights["linear.bias"])
    [answer] = drive(engine(embedder(folder))).run(embed("j", text(6)))
    assert_close(vectors(answer), [expected / expected.norm()])
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"2_Dense are pickled or missing.*--allow-pickle"):
        embedder(folder)


def test_dimensions_are_cut_and_normalised_again(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "qwen3", pooling="lasttoken")
    driver = drive(engine(embedder(folder)))
    cut, whole, many = driver.run(
        embed("cut", text(9), dimensions=8), embed("whole", text(9), dimensions=32), embed("many", "a", dimensions=33)
    )
    expected = Reference(folder, "last")(text(9))
    assert_close(vectors(whole), [expected])
    assert_close(vectors(cut), [expected[:8] / expected[:8].norm()])
    assert (error(many).status, error(many).param) == (400, "dimensions")
    assert "33" in str(error(many))
    assert "32" in str(error(many))


def test_token_ids_are_taken_as_they_are(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "roberta", pooling="mean_tokens")
    driver = drive(engine(embedder(folder)))
    reference = Reference(folder, "mean")
    [answer, wrong] = driver.run(embed("j", (5, 6, 7), (9,)), embed("wrong", (5, 512)))
    assert_close(vectors(answer), [reference((5, 6, 7)), reference((9,))])
    assert answer.usage == Usage(4, 0)
    assert (error(wrong).status, error(wrong).param) == (400, "input")
    assert "0 to 511" in str(error(wrong))


@pytest.mark.parametrize(("name", "limit"), [("bert", POSITIONS), ("roberta", POSITIONS), ("qwen3", POSITIONS)])
def test_an_input_that_is_too_long_is_refused_and_one_that_just_fits_is_not(
    name: str, limit: int, tmp_path: Path, drive: Drive
) -> None:
    folder = checkpoint(tmp_path / "m", name, pooling="mean_tokens")
    made = engine(embedder(folder))
    assert made.card.context_length == limit
    added = 1 if name in CAUSAL else 2
    fits, long = drive(made).run(
        embed("fits", text(limit - added)), embed("long", "w1", text(limit - added + 1), text(limit))
    )
    assert_close(vectors(fits), [Reference(folder, "mean")(text(limit - added))])
    assert fits.usage == Usage(limit, 0)
    assert (error(long).status, error(long).code, error(long).param) == (400, "context_length_exceeded", "input")
    assert f"{limit} tokens, but input 1 has {limit + 1}" in str(error(long))


def test_the_length_that_sentence_transformers_names_is_the_limit(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50, "do_lower_case": False}))
    assert embedder(folder).limit == 50


def test_a_prompt_of_the_checkpoint_stands_before_each_text(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens", prompts={"query": "w1 w2 ", "document": ""})
    reference = Reference(folder, "mean")
    for name, prompt in (("query", "w1 w2 "), ("document", ""), (None, "")):
        [answer] = drive(engine(embedder(folder, EncoderOptions(prompt_name=name)))).run(embed("j", text(6)))
        assert_close(vectors(answer), [reference(prompt + text(6))])
    with pytest.raises(ConfigurationError, match="no prompt named 'passage'; it has query, document"):
        embedder(folder, EncoderOptions(prompt_name="passage"))


def test_a_resumed_job_makes_only_what_is_missing(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    driver = drive(engine(embedder(folder)))
    texts = [text(length) for length in (3, 4, 40, 5)]
    [whole] = driver.run(embed("whole", *texts))
    prior = [piece for piece in whole.pieces if piece.choice in (2, 0)]
    driver.resume_behind(embed("again", *texts), prior)
    driver.resume_behind(embed("done", *texts), whole.pieces)
    again, done = driver.wait("again", "done")
    assert sorted(piece.choice for piece in again.pieces) == [1, 3]
    assert again.usage == done.usage == whole.usage == Usage(sum((3, 4, 40, 5)) + 8, 0)
    assert (done.pieces, done.finish_reason) == ([], "stop")


def test_vectors_come_as_they_are_done_and_jobs_take_turns(tmp_path: Path, drive: Drive) -> None:
    """A small job behind one of many long inputs waits for one batch, not for all of it."""
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    computer = embedder(folder)
    made = engine(computer, batch_tokens=200)
    large = embed("large", *(text(90, seed) for seed in range(20)))
    made.admit(Request(large, "large"))
    made.admit(Request(embed("small", text(3)), "small"))
    first, second = made.step(), made.step()
    assert [(output.ticket, len(output.pieces), output.ended) for output in first] == [("large", 2, None)]
    assert [output.ticket for output in second] == ["small"]
    assert second[0].ended is not None
    made.drop("large")
    assert made.wait_s() is None


def test_a_job_whose_input_fails_ends_alone(tmp_path: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    computer = embedder(folder)
    compute, sizes = computer.compute, []

    def poisoned(batch: Any) -> torch.Tensor:
        sizes.append(len(batch))
        if any(len(one.ids) == 12 for one in batch):
            raise RuntimeError("CPU allocator: can't allocate memory")
        result = compute(batch).clone()
        result[[len(one.ids) == 13 for one in batch]] = torch.nan
        return result

    monkeypatch.setattr(computer, "compute", poisoned)
    good = embed("good", *(text(length) for length in (8, 9, 9, 9, 8)))
    answers = drive(engine(computer)).run(good, embed("large", text(9), text(10)), embed("nan", text(11), text(9)))
    assert len(vectors(answers[0])) == 5
    assert (error(answers[1]).code, error(answers[2]).code) == ("out_of_memory", "not_finite")
    assert max(sizes) > 1


def test_less_goes_through_at_a_time_when_memory_was_out(
    tmp_path: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", "bert", pooling="mean_tokens")
    computer = embedder(folder)
    compute, sizes = computer.compute, []

    def small(batch: Any) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 8:
            raise RuntimeError("CUDA out of memory")
        return compute(batch)

    monkeypatch.setattr(computer, "compute", small)
    [answer] = drive(engine(computer, batch_tokens=640)).run(embed("j", *(text(8, seed) for seed in range(300))))
    assert len(vectors(answer)) == 300
    assert sum(size > 8 for size in sizes) < len(sizes) / 2, "most batches were small enough at once"


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "modernbert", "qwen3"])
def test_scores_are_those_of_plain_transformers_whatever_shares_the_batch(
    name: str, tmp_path: Path, drive: Drive
) -> None:
    folder = checkpoint(tmp_path / "m", name, labels=1)
    query, documents = text(4), [text(length, seed) for length in LENGTHS if length < 80 for seed in range(3)]
    expected = torch.tensor(reference_scores(folder, query, documents)).sigmoid()
    made = engine(ranker(folder))
    assert made._computer.pads
    answers = drive(made).run(*(rerank(f"j{n}", query, *documents[n::3]) for n in range(3)))
    for n, answer in enumerate(answers):
        torch.testing.assert_close(torch.cat(vectors(answer)), expected[n::3], rtol=0, atol=TOLERANCE)
    assert made.card.kind == "rerank"


def test_scores_are_raw_where_the_checkpoint_says_so(tmp_path: Path, drive: Drive) -> None:
    identity = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    folder = checkpoint(tmp_path / "m", "bert", labels=1, **identity)
    expected = reference_scores(folder, text(4), [text(9)])
    [answer] = drive(engine(ranker(folder))).run(rerank("j", text(4), text(9)))
    assert torch.cat(vectors(answer)).tolist() == pytest.approx(expected, abs=TOLERANCE)
    no_function = {"sentence_transformers": {"activation_fn": "os.system"}}
    with pytest.raises(ConfigurationError, match="no activation function"):
        ranker(checkpoint(tmp_path / "evil", "bert", labels=1, **no_function))


def test_a_decoder_without_a_padding_token_ranks_in_batches_of_one_length(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "qwen3", labels=1, pad_token_id=None)
    documents = [text(length, seed) for length in (5, 6) for seed in range(3)]
    expected = [reference_scores(folder, text(3), [one])[0] for one in documents]
    made = engine(ranker(folder))
    assert not made._computer.pads
    [answer] = drive(made).run(rerank("j", text(3), *documents))
    assert torch.cat(vectors(answer)).tolist() == pytest.approx(torch.tensor(expected).sigmoid().tolist(), abs=1e-6)


def test_a_pair_that_is_too_long_is_refused_by_the_name_of_its_parameter(tmp_path: Path, drive: Drive) -> None:
    folder = checkpoint(tmp_path / "m", "bert", labels=1)
    [answer] = drive(engine(ranker(folder))).run(rerank("j", text(60), "w1", text(80)))
    assert (error(answer).code, error(answer).param) == ("context_length_exceeded", "documents")
    assert "input 1 has 143" in str(error(answer))


def test_what_is_no_model_for_it_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3 labels: a ranking needs a cross-encoder"):
        ranker(checkpoint(tmp_path / "three", "bert", labels=3))
    with pytest.raises(ConfigurationError, match="classifier"):
        ranker(checkpoint(tmp_path / "plain", "bert"))
    folder = checkpoint(tmp_path / "max", "bert", pooling="max_tokens")
    with pytest.raises(ConfigurationError, match="pools by max_tokens; this engine knows mean, cls and last"):
        embedder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "path": "9", "type": "sentence_transformers.models.LSTM"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigurationError, match="LSTM"):
        embedder(folder, EncoderOptions(pooling="mean"))
