"""LangChain, LiteLLM, Instructor (in ``.venv-clients``) and Node's clients, each with its own test runner."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ..stack import API_KEY, Stack, environment_of
from .conftest import needed

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-clients" / "bin" / "python"
NODE_MODULES = HERE / "node" / "node_modules"
LIMIT_S = 240


def run(stack: Stack, command: list[str], folder: Path) -> str:
    """What the command prints; it knows the server as these clients do, from the environment."""
    values = {"OPENAI_BASE_URL": f"{stack.base}/v1", "OPENAI_API_KEY": API_KEY}
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**environment_of({}), **values},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.parametrize("name", ["langchain", "litellm", "instructor"])
def test_a_python_client_works_unchanged(clients_stack: Stack, name: str) -> None:
    needed(PYTHON.exists(), ".venv-clients is not there")
    folder = HERE / "python"
    flags = ("--rootdir", str(folder), "--confcutdir", str(folder), "-c", str(folder / "pytest.ini"))
    said = run(clients_stack, [str(PYTHON), "-m", "pytest", *flags, f"test_{name}.py"], folder)
    assert " passed" in said


@pytest.mark.parametrize("name", ["openai", "ai-sdk"])
def test_a_client_of_node_works_unchanged(clients_stack: Stack, name: str) -> None:
    node = shutil.which("node")
    needed(node is not None and NODE_MODULES.exists(), "node, or its modules, are not there")
    said = run(clients_stack, [str(node), "--test", "--test-reporter=tap", f"{name}.test.mjs"], HERE / "node")
    assert "\n# fail 0\n" in said
    assert "\n# pass 0\n" not in said
