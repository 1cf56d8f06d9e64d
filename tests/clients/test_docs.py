"""Every snippet of docs/clients.md is run as it stands there, and prints what stands beneath it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..stack import API_KEY, Stack, environment_of
from .conftest import needed
from .test_others import NODE_MODULES, PYTHON

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
SNIPPETS = [
    (title, *found) for title, text in SECTIONS for found in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
]


def runner(title: str, language: str) -> tuple[list[str], Path]:
    """The command that takes the snippet as its last argument, and where it runs."""
    if language == "js":
        node = shutil.which("node")
        needed(node is not None and NODE_MODULES.exists(), "node, or its modules, are not there")
        return [str(node), "--input-type=module", "-e"], NODE_MODULES.parent
    if language == "python":
        if title == "OpenAI for Python":
            return [sys.executable, "-c"], ROOT
        needed(PYTHON.exists(), ".venv-clients is not there")
        return [str(PYTHON), "-c"], ROOT
    assert language == "sh"
    needed(shutil.which("curl") is not None, "curl is not there")
    return ["bash", "-ec"], ROOT


@pytest.mark.parametrize(("title", "language", "code"), SNIPPETS, ids=[f"{one[0]}-{one[1]}" for one in SNIPPETS])
def test_a_snippet_prints_what_it_says(clients_stack: Stack, title: str, language: str, code: str) -> None:
    command, folder = runner(title, language)
    code = code.replace("http://127.0.0.1:8000", clients_stack.base).replace("sk-fcq-…", API_KEY)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    where = {"OPENAI_API_KEY": API_KEY, "FASTCHAT_Q_API_KEY": API_KEY, "FASTCHAT_Q_BASE_URL": clients_stack.base}
    ended = subprocess.run(
        [*command, code],
        cwd=folder,
        env={**environment_of({}), **where, "PATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = re.findall(r"^(?:#|//) → (.*)$", code, re.M)
    assert expected
    for line in expected:
        assert line in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0, ended.stderr


def test_every_client_has_a_snippet() -> None:
    assert {title for title, _, _ in SNIPPETS} == {title for title, _ in SECTIONS} - {
        "What clients send, and what becomes of it"
    }
