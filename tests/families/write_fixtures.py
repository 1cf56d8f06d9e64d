"""Writes fastchat_prompts.json with the original's code: ``python -m tests.families.write_fixtures CONVERSATION_PY``.

CONVERSATION_PY is fastchat/conversation.py of FastChat (0.2.36, commit 0e6d3e4); it imports nothing but the standard
library. Messages go in as its API server puts them in. Names of hosted models, which have no prompt here, get no bytes.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from fastchat_q.workers.families import families

from .conversations import CONVERSATIONS

OUT = Path(__file__).parent / "fastchat_prompts.json"


def render(template: Any, messages: list[dict[str, str]]) -> str:
    """The prompt as fastchat/serve/openai_api_server.py (get_gen_params) builds it."""
    conversation = template.copy()
    for message in messages:
        if message["role"] == "system":
            conversation.set_system_message(message["content"])
        else:
            conversation.append_message(conversation.roles[message["role"] == "assistant"], message["content"])
    if messages[-1]["role"] == "user":
        conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    assert isinstance(prompt, str)
    return prompt


def main(source: str) -> None:
    spec = importlib.util.spec_from_file_location("fastchat_conversation", source)
    assert spec is not None
    assert spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = original
    spec.loader.exec_module(original)
    prompts = {
        name: {case: render(template, messages) for case, messages in CONVERSATIONS.items()}
        if families()[name].bundled
        else {}
        for name, template in original.conv_templates.items()
    }
    OUT.write_text(json.dumps(prompts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
