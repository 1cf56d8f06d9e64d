"""What a checkpoint's config says: the class that loads it and how long its context is."""

import inspect
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from fastchat_q.jobs import Kind

LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx"),
    *("max_decoder_position_embeddings", "max_target_positions"),
)
"""Names that configs have for the positions a model was trained on, in the order in which they are asked.

T5 (relative buckets), BLOOM and MPT (ALiBi) could go on beyond theirs, with answers that get worse.
"""


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether it is of a model that reads text and images, and writes text."""
    return getattr(config, "vision_config", None) is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def model_class(config: PreTrainedConfig) -> Any:
    """The Auto class for a config: models with eyes, decoders, or else encoder-decoders such as T5."""
    if takes_images(config):
        return AutoModelForImageTextToText
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if (config.is_encoder_decoder or not decoder) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM


def encoder_class(config: PreTrainedConfig, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """The Auto class that makes vectors or scores, and its arguments: no pooler, which checkpoints may lack."""
    if kind == "rerank":
        return AutoModelForSequenceClassification, {}
    if config.is_encoder_decoder or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:  # T5's encoder
        return AutoModelForTextEncoding, {}
    model: Any = MODEL_MAPPING.get(type(config), None)
    optional = isinstance(model, type) and "add_pooling_layer" in inspect.signature(model).parameters
    return AutoModel, {"add_pooling_layer": False} if optional else {}


def context_length(config: PreTrainedConfig, cap: int | None = None) -> int | None:
    """Tokens of prompt and answer together; None when the config names none (Mamba) and none was given.

    Read from the text config as it stands: on transformers 5 a rope factor is already in it.
    """
    text = config.get_text_config()
    own = next((n for name in LENGTHS if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    return own if cap is None else min(cap, own or cap)
