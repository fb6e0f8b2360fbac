"""The documentation says what the code does: generated pages, links, blocks, the feature table."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer_core.catalogue import hook_names
from trainer_core.cli.main import COMMANDS
from trainer_core.errors import PluginError
from trainer_core.reference.backends import ENTRIES, described
from trainer_core.reference.hooks import CORE_USES, NO_USER_YET, users
from trainer_core.reference.pages import first_party, pages
from trainer_core.settings.explain import groups
from trainer_core.settings.files import read_json

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "plugins*/*/README.md")
    for page in ROOT.glob(pattern)
)
GENERATED = ("hooks.md", "settings.md", "data-backend.md", "schema.json")
STATUSES = ("done", "part", "later")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| ([A-H]\d+) \|(.*)\|([^|]*)\|$", re.MULTILINE)


@pytest.fixture(scope="module")
def catalogue():
    return first_party(ROOT / "plugins")


def told_but_absent() -> set[str]:
    """Return the plugins that the committed pages tell of and whose folder is not here."""
    text = (REFERENCE / "settings.md").read_text() + (REFERENCE / "hooks.md").read_text()
    told = set(re.findall(r"^## Plugin ([\w-]+):", text, re.MULTILINE))
    for line in re.findall(r"^Implemented by: (.*)\.$", text, re.MULTILINE):
        told |= {word for word in re.findall(r"`([^`]+)`", line) if not word.endswith(".py")}
    return {name for name in told if not (ROOT / "plugins" / name).is_dir()}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_up_to_date(name: str, catalogue):
    if absent := told_but_absent():
        pytest.skip(f"the committed pages tell of {', '.join(sorted(absent))}, which is not here")
    assert (REFERENCE / name).read_text(encoding="utf-8") == pages(catalogue)[name], "run make docs"


def test_pages_leave_other_plugins_out_and_miss_none(tmp_path: Path, catalogue):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "pyproject.toml").touch()
    with pytest.raises(PluginError, match=r"trainer-stranger of .* cannot be found"):
        first_party(tmp_path)
    (tmp_path / "none").mkdir()
    assert not first_party(tmp_path / "none")
    names = {name: f"trainer-{name.replace('_', '-')}" for name in catalogue}
    assert all(entry.distribution == names[name] for name, entry in catalogue.items())


def test_every_key_has_a_description(catalogue):
    for group in groups(catalogue):
        for row in group.rows:
            assert row.about.endswith("."), f"{group.title}: {row.name}"


@pytest.mark.parametrize(("title", "model", "notes"), ENTRIES, ids=lambda v: str(v)[:20])
def test_every_key_of_the_data_file_has_a_description(title: str, model, notes):
    assert set(notes) <= set(model.model_fields), "a description of a key that is gone"
    for key, about in described(model, notes).items():
        assert about.endswith("."), f"{title}: {key}"


def test_every_hook_has_a_heading_and_a_user_or_a_reason(catalogue):
    text = pages(catalogue)["hooks.md"]
    headings = re.findall(r"^## (\w+)$\n\n```python\ndef (\w+)\(", text, re.MULTILINE)
    assert {name for name, _ in headings} == hook_names()
    assert all(name == function for name, function in headings)
    for hook in hook_names():
        if told_but_absent():
            continue
        used = bool(users(hook, catalogue)) or hook in CORE_USES
        assert used != (hook in NO_USER_YET), f"{hook}: a user, or a reason why there is none"
    assert "unexplained" not in text or told_but_absent()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lies_in_a_deleted_plugin(target: Path) -> bool:
    absent = [(ROOT / "plugins" / name).resolve() for name in told_but_absent()]
    return any(target.resolve().is_relative_to(folder) for folder in absent)


def broken_links(page: Path, root: Path = ROOT) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue  # the web is not asked
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if lies_in_a_deleted_plugin(target):
            continue
        is_missing = not target.exists() or not target.resolve().is_relative_to(root)
        if is_missing or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#no-title) [c](gone.md) [d](https://x.y/z)\n")
    assert list(broken_links(page, tmp_path)) == ["#no-title", "gone.md"]


def blocks(*languages: str) -> list[pytest.ParameterSet]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        if page.name not in GENERATED
        for number, (language, block) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if language in languages
    ]


def wrong_words(block: str) -> Iterator[str]:
    """Yield the commands of a shell block that this repository does not have."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        program, words = (Path(words[0]).name, words[1:]) if words else ("", [])
        if program == "trainer" and words[0] not in COMMANDS and words[0] not in ("--help", "-h"):
            yield f"trainer {words[0]}"
        if program == "make":
            named = {word for word in words if not word.startswith("-") and "=" not in word}
            yield from (f"make {word}" for word in sorted(named - targets))
        if program.startswith("python") and words[:1] == ["-m"] and not has_module(words[1]):
            yield f"-m {words[1]}"
        if "--config" in words and (file := words[words.index("--config") + 1]):
            is_shipped = file.startswith("config/") and (ROOT / file).parent != ROOT / "config"
            if is_shipped and not (ROOT / file).exists():
                yield f"--config {file}"


def has_module(name: str) -> bool:
    owner = re.match(r"trainer_(?!core)(\w+)", name)
    if owner and not (ROOT / "plugins" / owner[1]).is_dir():
        return True  # the plugin's folder was deleted
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("block", blocks("sh", "bash", "console"))
def test_commands_of_a_shell_block_exist(block: str):
    assert list(wrong_words(block)) == []


def test_a_wrong_command_is_found():
    block = (
        "make tset\nX=1 .venv/bin/trainer rnu --config a.json  # go\npython -m trainer_core.no\n"
    )
    assert list(wrong_words(block)) == ["make tset", "trainer rnu", "-m trainer_core.no"]


@pytest.mark.parametrize("block", blocks("json", "jsonc", "json5"))
def test_a_json_block_parses(block: str, tmp_path: Path):
    file = tmp_path / "block.json"
    file.write_text(block, encoding="utf-8")
    assert read_json(file)


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_compiles(block: str):
    compile(block, "block", "exec")


def feature_rows() -> dict[str, str]:
    text = (REFERENCE / "features.md").read_text(encoding="utf-8")
    return {number: status.strip() for number, _, status in ROW.findall(text)}


def test_the_feature_table_has_every_row_once():
    text = (REFERENCE / "features.md").read_text(encoding="utf-8")
    numbers = [number for number, _, _ in ROW.findall(text)]
    last = {"A": 12, "B": 13, "C": 15, "D": 9, "E": 3, "F": 7, "G": 5, "H": 8}
    wanted = {f"{letter}{n}" for letter, count in last.items() for n in range(1, count + 1)}
    assert len(numbers) == len(set(numbers))
    assert set(numbers) == wanted


@pytest.mark.parametrize(("number", "status"), feature_rows().items())
def test_a_features_status_points_to_tests_that_exist(number: str, status: str):
    word, _, rest = status.partition(":")
    assert word in STATUSES
    tests = re.findall(r"`([^`]+\.py)`", rest)
    assert tests or word != "done", "done needs a test that proves it"
    for path in tests:
        owner = re.match(r"plugins/[\w-]+", path)
        if owner and not (ROOT / owner[0]).is_dir():
            continue  # the plugin's folder was deleted
        assert (ROOT / path).is_file(), path
        assert Path(path).name.startswith("test_"), path
    if word == "part":
        assert "missing" in rest, "part says what is missing"
