"""The conversations that FastChat rendered once for the fixtures, and that our templates render in the tests."""

from typing import Any

PARTIAL = "The three are\nred, gr"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one_turn": [{"role": "user", "content": "What is 7 + 5?"}],
    "system": [
        {"role": "system", "content": "You answer in “verse”, {briefly}."},
        {"role": "user", "content": "Who are you?\r\nSay it in Grüße 你好."},
    ],
    "empty_system": [{"role": "system", "content": ""}, {"role": "user", "content": "Hello!"}],
    "three_turns": [
        {"role": "user", "content": "  Hello there \n\nmy friend  "},
        {"role": "assistant", "content": "Hello! \n How can I help you?\n\n"},
        {"role": "user", "content": "Tell me 'a' \"story\" of <b>Mia</b> & Tom.\n\n\n"},
        {"role": "assistant", "content": "Once upon a time …"},
        {"role": "user", "content": "Go on!"},
    ],
    "continuation": [
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": PARTIAL},
    ],
}
"""By name. ``continuation`` ends with a turn of the assistant, which is rendered without a generation prompt."""
