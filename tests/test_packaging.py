"""The shape of the house: layers, the package list, the wheel, the command line's weight."""

import ast
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALVES = {"fastchat_q": "fastchat_q", "api": "fastchat_q.api", "workers": "fastchat_q.workers"}
HEAVY = {"torch", "transformers", "accelerate", "fastapi", "starlette", "uvicorn", "sse_starlette", "arq"}
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def modules(folder: str) -> Iterator[tuple[str, Path]]:
    """(dotted name as installed, file) of every module of a top-level folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        yield ".".join((HALVES[folder], *(part for part in parts if part != "__init__"))), path


def imports(name: str, path: Path, *, top_level: bool = False) -> set[str]:
    """The absolute names a module imports; with ``top_level`` only those that run when it is imported."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names for prefix in prefixes if name == prefix or name.startswith(prefix + ".")}


def test_the_core_imports_nothing_heavy() -> None:
    for name, path in modules("fastchat_q"):
        assert not within(imports(name, path), *HEAVY), name


def test_the_core_knows_the_halves_only_to_start_them() -> None:
    for name, path in modules("fastchat_q"):
        used = within(imports(name, path), "fastchat_q.api", "fastchat_q.workers")
        assert not used or name in {"fastchat_q.cli", "fastchat_q.cli_models"}, name
        assert not within(imports(name, path, top_level=True), "fastchat_q.api", "fastchat_q.workers")


def test_the_halves_do_not_know_each_other() -> None:
    for name, path in modules("api"):
        assert not within(imports(name, path), "fastchat_q.workers"), name
        assert not within(imports(name, path), "torch", "transformers"), name
    for name, path in modules("workers"):
        assert not within(imports(name, path), "fastchat_q.api", "fastapi", "starlette"), name


def test_torch_lives_in_the_engines_alone() -> None:
    for name, path in modules("workers"):
        if not name.startswith("fastchat_q.workers.engines."):
            assert not within(imports(name, path), "torch", "transformers"), name


def test_only_keys_py_spells_a_redis_name() -> None:
    for folder in HALVES:
        for name, path in modules(folder):
            if name == "fastchat_q.keys":
                continue
            texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            assert not [text for text in texts if isinstance(text, str) and text.startswith("fq:")], name
    for script in (ROOT / "fastchat_q" / "lua").glob("*.lua"):
        assert "fq:" not in script.read_text(), script


def test_every_script_file_is_known_and_documented() -> None:
    from fastchat_q.scripts import NAMES

    files = {path.stem: path.read_text() for path in (ROOT / "fastchat_q" / "lua").glob("*.lua")}
    assert set(files) == {*NAMES, "prelude", "transitions"}
    for name in NAMES:
        head = files[name].partition("\nlocal ")[0]
        assert head.startswith(f"-- {name.upper()}: "), name
        assert "-- ARGV: " in head, name
        assert "-- returns " in head, name


def test_the_package_list_names_every_folder_with_code() -> None:
    folders = set()
    for folder, package in HALVES.items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            folders.add(".".join((package, *marker.parent.relative_to(ROOT / folder).parts)))
    assert set(SETUP["packages"]) == folders


@pytest.mark.parametrize("half", ["api", "workers"])
def test_a_half_refuses_to_be_imported_under_its_folder_name(half: str) -> None:
    ran = subprocess.run([sys.executable, "-c", f"import {half}"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert f"import fastchat_q.{half}, not {half}" in ran.stderr


def test_the_wheel_holds_everything_it_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *HALVES):  # a copy: the build writes beside the source
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True, capture_output=True, timeout=250)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith("fastchat_q-")}
        model = sum(i.file_size for i in archive.infolist() if "/tiny/model/" in i.filename)
    expected = set()
    for folder, package in HALVES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(str(Path(package.replace(".", "/")) / path.relative_to(ROOT / folder)))
    assert held == expected
    assert 1_000_000 < model <= 4 * 1024 * 1024
    assert wheel.stat().st_size <= 4 * 1024 * 1024


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fastchat_q.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        f"print('HEAVY', sorted(m for m in {sorted(HEAVY)!r} if m in sys.modules))"
    )
    took = []
    for _ in range(5):
        began = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
        took.append(time.perf_counter() - began)
        assert "HEAVY []" in ran.stdout
        assert "orchestrator" in ran.stdout
    print(f"--help took {min(took) * 1000:.0f} ms at best")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["worker", "--engine", "magic"], "not one of 'transformers'"),
        (["worker", "--engine", "echo", "--redis-url", "http://x"], "expected one of redis://"),
        (["worker", "--model", "tiny", "--device", "tpu"], "not one of 'auto', 'cpu'"),
        (["worker", "--model", "tiny", "--dtype", "int4"], "not one of 'auto', 'float32'"),
        (["up", "--port", "99999"], "65535"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "fastchat_q.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_misspelt_setting_is_not_silent_and_a_wrong_one_is_named() -> None:
    command = [sys.executable, "-m", "fastchat_q.cli", "serve", "--host", "0.0.0.0", "--no-auth"]
    wrong = {"FASTCHAT_Q_PROT": "8001"}
    ran = subprocess.run(command, capture_output=True, text=True, env=wrong, timeout=60)
    assert "FASTCHAT_Q_PROT is no setting of fastchat-q" in ran.stderr
    wrong = {"FASTCHAT_Q_PORT": "eight"}
    ran = subprocess.run(command, capture_output=True, text=True, env=wrong, timeout=60)
    assert ran.returncode == 2
    assert "FASTCHAT_Q_PORT" in ran.stderr
