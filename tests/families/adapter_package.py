"""The example package of docs/adding-a-model.md, written out as pip would install it."""

import re
from pathlib import Path

DOC = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """The file of that name in the document: a code block that begins with it in a comment."""
    [block] = re.findall(rf"```\w+\n(?:# |{{#- ){re.escape(name)}(?: -#}})?\n(.*?)```", DOC, re.DOTALL)
    return str(block)


def write(folder: Path, *names: str) -> None:
    """Writes files of the document into a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(example(name), encoding="utf-8")


def install(site: Path, name: str, code: str, target: str) -> None:
    """A module with an entry point in the group of adapters, as a wheel lies in site-packages."""
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(code, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fastchat_q.adapters]\n{name} = {target}\n")
