"""What a structured output costs a step, with llguidance and with xgrammar, and which of their answers are right.

    python bench/guides.py TOKENIZER_DIR [--rows 8] [--steps 200]

Rows are driven with random logits, the worst case: a model would stay inside most grammars by itself. xgrammar is no
dependency of the project; install it beside it for the comparison.
"""

import argparse
import json
import time
from typing import Any

import jsonschema
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TAG = {"enum": ["a", "b", "c"]}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": TAG, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "free text": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    "references": {
        "$defs": {"p": POINT},
        "type": "array",
        "items": {"$ref": "#/$defs/p"},
        "minItems": 2,
        "maxItems": 3,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    "200 properties": {
        "type": "object",
        "properties": {f"property_{i}": {"type": ["integer", "null"]} for i in range(200)},
        "required": [f"property_{i}" for i in range(5)],
        "additionalProperties": False,
    },
    "enum of 2,000": {"enum": [f"value number {i} of many" for i in range(2000)]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "maxItems": 3, "uniqueItems": True},
    "dependentRequired": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "dependentRequired": {"a": ["b"]},
        "additionalProperties": False,
    },
}


class LLGuidance:
    """https://github.com/guidance-ai/llguidance"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import llguidance.hf

        self._lib, self._tokenizer = llguidance, llguidance.hf.from_tokenizer(tokenizer)

    def compile(self, schema: dict[str, Any]) -> Any:
        grammar = self._lib.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = self._lib.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0])
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any, bits: np.ndarray) -> None:
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        matcher.consume_token(token)
        return bool(matcher.is_stopped())


class XGrammar:
    """https://github.com/mlc-ai/xgrammar"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import torch
        import xgrammar

        self._lib, self._torch = xgrammar, torch
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: dict[str, Any]) -> Any:
        return self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)

    def matcher(self, compiled: Any) -> Any:
        return self._lib.GrammarMatcher(compiled)

    def fill(self, matcher: Any, bits: np.ndarray) -> None:
        matcher.fill_next_token_bitmask(self._torch.from_numpy(bits[None]), 0)

    def accept(self, matcher: Any, token: int) -> bool:
        assert matcher.accept_token(token)
        return bool(matcher.is_terminated())


def run(engine: Any, tokenizer: PreTrainedTokenizerBase, name: str, rows: int, steps: int) -> None:
    schema, vocabulary = SCHEMAS[name], len(tokenizer)
    start = time.perf_counter()
    try:
        compiled = engine.compile(schema)
    except (ValueError, RuntimeError) as error:
        print(f"  {name:18} refused: {str(error)[:80]}")
        return
    compile_s = time.perf_counter() - start
    random = np.random.default_rng(0)
    fills, accepts, ids = [], [], [[] for _ in range(rows)]
    matchers = {i: engine.matcher(compiled) for i in range(rows)}
    bits = np.zeros((vocabulary + 31) // 32, np.int32)
    for _ in range(steps):
        for i, matcher in list(matchers.items()):
            began = time.perf_counter()
            engine.fill(matcher, bits)
            fills.append(time.perf_counter() - began)
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocabulary].nonzero()[0]
            token = int(random.choice(allowed))
            if token == tokenizer.eos_token_id:
                del matchers[i]
                continue
            ids[i].append(token)
            began = time.perf_counter()
            if engine.accept(matcher, token):
                del matchers[i]
            accepts.append(time.perf_counter() - began)
    done = [tokenizer.decode(one) for i, one in enumerate(ids) if i not in matchers]
    right = sum(is_valid(text, schema) for text in done)
    fills.sort()
    print(
        f"  {name:18} compile {compile_s * 1e3:8.1f} ms, fill {np.mean(fills) * 1e6:7.1f} us a row and step "
        f"(p99 {fills[int(len(fills) * 0.99)] * 1e6:8.1f}, worst {fills[-1] * 1e6:8.1f}), "
        f"accept {np.mean(accepts) * 1e6:6.1f} us; right {right} of {len(done)} ended",
        flush=True,
    )


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    for kind in (LLGuidance, XGrammar):
        start = time.perf_counter()
        try:
            engine = kind(tokenizer)
        except ImportError as error:
            print(f"{kind.__name__}: {error}")
            continue
        print(f"{kind.__name__}: {len(tokenizer):,} tokens, set up in {time.perf_counter() - start:.2f} s")
        for name in SCHEMAS:
            run(engine, tokenizer, name, options.rows, options.steps)


if __name__ == "__main__":
    main()
