"""Small models with eyes: random weights, and processors made here around the built-in tokenizer."""

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing.vision import sight_of
from PIL import Image
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .random_models import COMMON, CONTEXT, _spread

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}\
{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


class Seeing(NamedTuple):
    """A model and its processor."""

    model: PreTrainedModel
    processor: Any

    def loaded(self) -> Loaded:
        device, tokenizer = torch.device("cpu"), self.processor.tokenizer
        sight = sight_of(self.processor, tokenizer.chat_template, self.model, device)
        assert sight is not None
        return Loaded(self.model, tokenizer, device, CONTEXT, frozenset(), sight=sight)


def _with_tokens(tokenizer: PreTrainedTokenizerBase, image: str, *tokens: str, **names: str) -> Any:
    own: Any = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(token, special=True) for token in tokens])
    own.chat_template = TEMPLATE.replace("IMAGE", image)
    for name, token in names.items():
        setattr(own, name, token)
        setattr(own, f"{name}_id", own.convert_tokens_to_ids(token))
    return own


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {**COMMON, "vocab_size": len(tokenizer), **more}


def _llava(base: PreTrainedTokenizerBase) -> Seeing:
    tokenizer = _with_tokens(base, "<image>", "<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **EYES},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return Seeing(transformers.LlavaForConditionalGeneration(config), processor)


def _idefics3(base: PreTrainedTokenizerBase) -> Seeing:
    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = _with_tokens(base, "<image>", *names, *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    config = transformers.Idefics3Config(
        vision_config=dict(EYES),
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return Seeing(transformers.Idefics3ForConditionalGeneration(config), processor)


def _gemma3(base: PreTrainedTokenizerBase) -> Seeing:
    names = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    tokenizer = _with_tokens(
        base,
        "<start_of_image>",
        *names,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        vision_config=dict(EYES),
        text_config=_text(tokenizer, head_dim=8, query_pre_attn_scalar=1, sliding_window=64, layer_types=layers),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros: it would not see
    return Seeing(model, processor)


class ImagesOnly(transformers.Qwen2VLProcessor):
    """Without the half for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(name, argument)


def _qwen2_vl(base: PreTrainedTokenizerBase) -> Seeing:
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _with_tokens(base, "<|vision_start|><|image_pad|><|vision_end|>", *names)
    images = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 56}
    )
    processor = ImagesOnly(images, tokenizer, chat_template=tokenizer.chat_template)
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7},
        text_config=_text(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Seeing(transformers.Qwen2VLForConditionalGeneration(config), processor)


FAMILIES: dict[str, Callable[[PreTrainedTokenizerBase], Seeing]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2-vl": _qwen2_vl,
}


def seeing(name: str, tokenizer: PreTrainedTokenizerBase) -> Seeing:
    """A model in float64 whose answers are not one token for ever."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name](tokenizer)
    return Seeing(_spread(model), processor)


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image of noise, each number another one in another shape."""
    width, height = 30 + 7 * number, 50 - 5 * number
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
    content = io.BytesIO()
    Image.fromarray(noise.to(torch.uint8).numpy()).save(content, kind)
    return content.getvalue()
