"""The guide and the README show code that runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(document):
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["docs/guide.md", "docs/durability.md", "README.md"])
def test_the_code_in_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(document)
    assert blocks
    names = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    if "field" in names:
        names["field"].close()


def test_every_relative_link_leads_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
