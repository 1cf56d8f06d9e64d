"""``fastchat-q models families``: what is known, on a machine with the API alone."""

import json
import subprocess
import sys

from fastchat_q.workers.families import families

MISSING = "import sys; sys.modules.update(dict.fromkeys({!r})); sys.argv[0] = 'fastchat-q'; "
RUN = "from fastchat_q.cli import main; main()"


def command(*arguments: str, without: tuple[str, ...] = ("torch", "transformers")) -> subprocess.CompletedProcess[str]:
    code = MISSING.format(without) + RUN
    return subprocess.run(
        [sys.executable, "-c", code, "models", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_every_family_is_listed_without_torch_and_transformers() -> None:
    ran = command("families")
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()
    assert head.split() == ["FAMILY", "TEMPLATE", "TOOLS", "REASONING", "NOTES"]
    assert [line.split()[0] for line in lines] == list(families())
    [claude] = [line for line in lines if line.startswith("claude-3-opus")]
    assert "- (anthropic api)" in claude


def test_one_family_is_shown_whole_with_a_prompt_that_it_renders() -> None:
    ran = command("families", "llama-2")
    assert ran.returncode == 0, ran.stderr
    assert "meta-llama/Llama-2-13b-chat-hf" in ran.stdout
    assert "[INST] What is 7 + 5? [/INST] 12 </s><s>[INST] And 12 + 5? [/INST]" in ran.stdout


def test_without_jinja_the_row_is_shown_all_the_same() -> None:
    ran = command("families", "llama-2", without=("torch", "transformers", "jinja2"))
    assert ran.returncode == 0, ran.stderr
    assert "meta-llama/Llama-2-13b-chat-hf" in ran.stdout
    assert "pip install jinja2" in ran.stdout


def test_as_json_the_rows_are_what_the_loader_read() -> None:
    listed = json.loads(command("families", "--json").stdout)["data"]
    assert [row["name"] for row in listed] == list(families())
    one = json.loads(command("families", "gemma", "--json").stdout)
    assert one["format"]["open"] == "<start_of_turn>model\n"
    assert one["example"].startswith("<bos><start_of_turn>user\nWhat is 7 + 5?")


def test_a_name_that_is_not_there_is_exit_code_4_with_those_that_are_close() -> None:
    ran = command("families", "vicuna")
    assert ran.returncode == 4
    assert "There is no family 'vicuna'; did you mean" in ran.stderr
    assert "vicuna_v1.1" in ran.stderr
