"""Models with eyes say what `generate` says of the same images: alone, among rows of text, and resumed."""

import hashlib
import io
import zlib
from collections.abc import Sequence

import pytest
import torch
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.batching.engine import TransformersEngine, build
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.batching.packed import Packed
from fastchat_q.workers.engines.batching.passes import Chunk, Row
from fastchat_q.workers.engines.batching.passes import Part as StepPart
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing import vision
from PIL import Image
from transformers import PreTrainedTokenizerBase

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Job, Message, Part, Sampling

from .conftest import Drive
from .driving import Driver
from .driving import job as text_job
from .scenes import TALK, generated, prompt_ids, question
from .vision_models import FAMILIES, Seeing, picture, seeing

ENGINES = dict.fromkeys(FAMILIES, TransformersEngine) | {"qwen2-vl": GenerateEngine}
TOKENS = 12


class Scene:
    """A model of a family, its engine, and what it should say."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.seeing: Seeing = seeing(name, tokenizer)
        self.loaded: Loaded = self.seeing.loaded()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    def expected(self, text: str, pictures: Sequence[bytes]) -> tuple[int, ...]:
        """What the model's own `generate` makes of its processor's inputs."""
        parts = [{"type": "image", "image": Image.open(io.BytesIO(content)).convert("RGB")} for content in pictures]
        inputs = self.seeing.processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(torch.float64)
        model = self.seeing.model
        output = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
        return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.fixture(scope="module", params=FAMILIES)
def scene(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Scene:
    return Scene(request.param, tokenizer)


def asking(job_id: str, text: str, pictures: Sequence[bytes], prior: Sequence[int] = (), **fields: int) -> Request:
    """A request with images before its text."""
    blobs = {hashlib.sha256(content).hexdigest(): content for content in pictures}
    names = [hashlib.sha256(content).hexdigest() for content in pictures]
    parts = (*(Part(type="image", blob=name) for name in names), Part(type="text", text=text))
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, **fields)
    job = Job(id=job_id, model="m", messages=(Message(role="user", content=parts),), sampling=sampling)
    return Request(job, job_id, (Piece(tuple(prior)),) if prior else (), blobs)


def said(driver: Driver, *requests: Request) -> list[tuple[int, ...]]:
    for request in requests:
        driver.take(request)
    return [answer.ids for answer in driver.wait(*(request.job.id for request in requests))]


def test_an_answer_about_images_is_that_of_generate_alone_and_among_text(scene: Scene, drive: Drive) -> None:
    engine = build("m", 8, scene.loaded, 2**26)
    assert isinstance(engine, ENGINES[scene.name])
    assert "vision" in engine.card.features
    driver = drive(engine)
    asked = [("What is this?", [picture(0)]), ("And these two?", [picture(1), picture(2)]), ("This?", [picture(3)])]
    asked.append((f"This? {TALK * 4}", [picture(0)]))  # longer than the window of a layer
    expected = [scene.expected(text, pictures) for text, pictures in asked]
    assert len({token for ids in expected for token in ids}) > 2, "one that repeats itself proves little"
    assert scene.expected("What is this?", [picture(1)]) != expected[0], "it does look"
    [alone] = said(driver, asking("alone", *asked[0]))
    assert alone == expected[0]
    texts = [text_job(f"t{i}", question(i), max_tokens=TOKENS) for i in range(3)]
    driver.submit(*texts)
    together = said(driver, *(asking(f"v{i}", *one) for i, one in enumerate(asked)))
    assert together == expected
    for i, answer in enumerate(driver.wait("t0", "t1", "t2")):
        assert answer.ids == generated(scene.seeing.model, prompt_ids(scene.tokenizer, question(i)), TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_an_image_see_one_another_where_the_model_wants_it(
    tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """As Gemma 3 does: in 16 bits, causal attention there is off by hardly more than rounding."""
    scene = seeing("gemma3", tokenizer)
    scene.model.to(dtype)  # type: ignore[arg-type]
    loaded = scene.loaded()
    engine = build("m", 8, loaded, 2**26)
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine.way, Packed)
    assert loaded.sight is not None
    ids, inputs = loaded.sight.example()
    row = Row(inputs=inputs)
    with torch.inference_mode():
        assert engine.way.reserve(row, len(ids) + 1)
        [logits] = engine.way.run(StepPart([], [Chunk(row, ids, last=True)])).logits
        right = engine.way.model.seen(ids, inputs)
        causal = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        wrong = engine.way.model.seen(ids, causal)
    assert (logits - right).norm() < 0.01 * (wrong - right).norm()


def test_an_answer_about_an_image_is_resumed_where_it_was(scene: Scene, drive: Drive) -> None:
    driver = drive(build("m", 4, scene.loaded, 2**26))
    whole = scene.expected("What is this?", [picture(0)])
    for cut in (1, 7):
        [rest] = said(driver, asking(f"r{cut}", "What is this?", [picture(0)], whole[:cut]))
        assert rest == whole[cut:]


def test_choices_share_what_was_seen(scene: Scene, drive: Drive) -> None:
    request = asking("n", "What is this?", [picture(0)], n=2)
    driver = drive(build("m", 4, scene.loaded, 2**26))
    driver.take(request)
    [answer] = driver.wait("n")
    expected = scene.expected("What is this?", [picture(0)])
    for choice in (0, 1):
        assert tuple(t for piece in answer.pieces if piece.choice == choice for t in piece.ids) == expected


def test_placeholders_that_a_user_types_are_text(scene: Scene, drive: Drive) -> None:
    token = next(
        word for word in ("<image>", "<start_of_image>", "<|image_pad|>") if word in scene.tokenizer.get_vocab()
    )
    driver = drive(build("m", 4, scene.loaded, 2**26))
    [plain] = said(driver, asking("a", "What is this?", [picture(0)]))
    driver.take(asking("b", f"What {token} is {token * 3} this?", [picture(0)]))
    [typed] = driver.wait("b")
    if scene.name == "idefics3":  # its processor cannot tell them apart
        assert typed.ended is not None
        assert typed.ended.error is not None
        assert (typed.ended.error.code, typed.ended.error.status) == ("control_token", 400)
        return
    assert typed.finish_reason == "length", "it is answered, with one image"
    assert len(plain) == len(typed.ids) == TOKENS


def test_a_damaged_image_fails_its_request_alone(scene: Scene, drive: Drive) -> None:
    driver = drive(build("m", 4, scene.loaded, 2**26))
    driver.take(asking("bad", "What?", [picture(0)[:60]]))
    driver.take(asking("good", "What is this?", [picture(0)]))
    bad, good = driver.wait("bad", "good")
    assert bad.ended is not None
    assert isinstance(bad.ended.error, InvalidRequestError)
    assert (bad.ended.error.code, bad.ended.error.param) == ("invalid_image", "messages")
    assert len(good.ids) == TOKENS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_formats_are_decoded_to_rgb(kind: str) -> None:
    image = vision.decode(picture(2, kind))
    assert (image.mode, image.size) == ("RGB", (44, 40))


def test_of_an_animation_the_first_frame_counts_and_of_what_is_transparent_white() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    assert vision.decode(content.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    content = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(content, "PNG")
    assert vision.decode(content.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_a_small_file_that_claims_to_be_vast_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = (60_000).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(InvalidRequestError, match="pixels") as refused:
        vision.decode(bomb)
    assert refused.value.code == "image_too_large"
    with pytest.raises(InvalidRequestError, match="decoded"):
        vision.decode(b"BM" + bytes(100))
