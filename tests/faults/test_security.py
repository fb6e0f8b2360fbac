"""No pickle and no remote code, no file outside the folders of a run, no secret in what a run leaves."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.sandbox import ENTRY, PLUGIN, Sandbox, make, make_clips

from trainer_core.settings.core import CoreSettings
from trainer_core.testing.clips import write_clips

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-0123456789abcdef"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def box(tmp_path, clips, capsys, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "clips").symlink_to(clips)
    return make(tmp_path / "work", tmp_path / "site", capsys, monkeypatch)


# --- no pickle, no remote code ---------------------------------------------------------------------


def sources() -> Iterator[Path]:
    for folder in ("core", "plugins", "plugins_contrib"):
        for path in (ROOT / folder).rglob("*.py"):
            if "tests" not in path.relative_to(ROOT).parts:
                yield path


FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}


def offences(path: Path) -> Iterator[str]:
    """Yield what in a source file could run code that came with data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        else:
            names = []
        yield from (f"{place}: imports {name}" for name in names if name in FORBIDDEN)
        named = isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle")
        if named and ast.unparse(node.value) != "False":
            yield f"{place}: {node.arg}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {word.arg for word in node.keywords}
            if called in CALLS:
                yield f"{place}: {called}"
            if called.endswith(("torch.load", "torch.hub.load", "np.load", "numpy.load")):
                yield f"{place}: {called}"
            if called.endswith("yaml.load") or "shell" in words:
                yield f"{place}: {called}"
            model = called.endswith(".from_pretrained") and "use_safetensors" not in words
            if model and re.search(r"(Model|Transformer|Autoencoder|Encoder)", called):
                yield f"{place}: {called} may read a pickle; say use_safetensors=True"


def test_no_source_of_ours_opens_a_pickle_or_runs_what_came_with_data():
    assert [offence for path in sources() for offence in offences(path)] == []
    assert len(list(sources())) > 50


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from dill import loads", "torch.load(p)", "np.load(p)", "eval(text)",
        "a.from_pretrained(p, trust_remote_code=True)", "yaml.load(f)",
        "UMT5EncoderModel.from_pretrained(p)", "run(c, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code, tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(code)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(offences(tmp_path / "m.py"))) == 1


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("ending", ["bin", "pt", "ckpt", "pth"])
@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder"])
def test_weights_that_are_a_pickle_are_refused_unopened(part, ending, tmp_path):
    """Whatever plugin reads a component: the way out is told and nothing ran."""
    (tmp_path / part).mkdir(parents=True)
    (tmp_path / part / "config.json").write_text('{"model_type": "umt5"}')
    (tmp_path / "tokenizer").mkdir()
    bomb = tmp_path / "exploded"
    (tmp_path / part / f"model.{ending}").write_bytes(pickle.dumps(Bomb(bomb)))
    if part == "text_encoder":
        files = pytest.importorskip("trainer_umt5.files")
        with pytest.raises(Exception, match=r"a pickle, which is never loaded\. Save") as told:
            files.locate(str(tmp_path))
    else:
        weights = pytest.importorskip("trainer_wan.weights")
        with pytest.raises(Exception, match=r"a pickle, which is never loaded\. Save") as told:
            weights.Weights(str(tmp_path)).component(part)
    assert f"model.{ending}" in str(told.value)
    assert type(told.value).__name__ == "ModelError"
    assert not bomb.exists()


def test_a_pickle_for_weights_in_a_checkpoint_or_cache_is_never_opened(box):
    """A safetensors name with a pickle in it: the cache entry is made anew, the checkpoint refused."""
    box.write()
    assert box.run().code == 0
    bomb = box.root / "exploded"
    data = pickle.dumps(Bomb(bomb))
    for path in [
        *Path("cache").rglob("*.zst"),
        *Path("output").rglob("checkpoint-*/*.safetensors"),
    ]:
        path.write_bytes(data)
    answer = box.run("--max_train_steps", "3")
    assert answer.code == 2
    assert "--resume_from_checkpoint none" in answer.err
    again = box.run("--max_train_steps", "3", "--resume_from_checkpoint", "none")
    assert again.code == 0, again.err
    assert "was damaged and is rebuilt" in again.out
    assert not bomb.exists()


# --- names stay in their folders -------------------------------------------------------------------

NAMES = (
    "../../up",
    "/tmp/trainer-up",
    "..",
    "a/../../../up",
    "up\\..\\up",
    "a\nb",
    "~root",
    "$HOME",
)


def tree(root: Path, *but: str) -> dict[str, bytes]:
    """Return every file below ``root``, but for those in the named folders of it."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(name == each or name.startswith(f"{each}/") for each in but):
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_user_never_leave_the_folders_of_a_run(name, tmp_path, capsys, monkeypatch):
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    write_clips(work / "clips", n=2, sizes=[(32, 32)], frames=9, fps=16)
    box = make(work, tmp_path / "site", capsys, monkeypatch)
    for number, path in enumerate(sorted((work / "clips").glob("*.mp4"))):
        path.with_suffix(".txt").write_text(f"{name}\n../../{number}\n")
    box.write(
        {
            "tracker_run_name": name,
            "tracker_project_name": name,
            "validation_prompt": name,
            "validation_negative_prompt": name,
            "validation_step_interval": 1,
        },
    )
    before = tree(tmp_path)
    outside = set(Path("/tmp").iterdir())
    with_id = box.check()
    answer = box.run()
    assert (with_id.code, answer.code) == (0, 0), answer.err
    assert tree(tmp_path, "a/b/work/output", "a/b/work/cache", "site") == {
        path: data for path, data in before.items() if not path.startswith("site/")
    }
    assert {p for p in set(Path("/tmp").iterdir()) - outside if "up" in p.name} == set()


@pytest.mark.parametrize("name", NAMES[:6])
def test_an_id_that_is_no_name_is_refused(name, box):
    box.write(id=name)
    answer = box.check()
    assert answer.code == 2
    assert "names a folder of the cache" in answer.err


def test_a_tracker_writes_into_the_output_folder_whatever_the_run_is_called(tmp_path):
    hooks = pytest.importorskip("trainer_tensorboard.hooks")

    for name in NAMES:
        settings = CoreSettings(tracker_run_name=name, tracker_project_name=name)
        found = hooks.folder(SimpleNamespace(settings=settings, output_dir=tmp_path / "output"))
        root = (tmp_path / "output" / "tensorboard").resolve()
        assert found.resolve() != root
        assert found.resolve().is_relative_to(root)


def test_a_link_among_the_clips_is_read_and_never_written(box):
    elsewhere = box.root.parent / "elsewhere"
    write_clips(elsewhere, n=1, sizes=[(32, 32)], frames=9, fps=16)
    before = tree(elsewhere)
    box.write(instance_data_dir=str(box.root / "linked"))
    (box.root / "linked").symlink_to(elsewhere)
    assert box.run().code == 0
    assert tree(elsewhere) == before


# --- secrets ---------------------------------------------------------------------------------------

KEYS = (
    "spy_token: str | None = key(None, 'A token.', secret=True, free=True)\n    spy_n: int = key(1)"
)
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
RAISES = """
    @hookimpl
    def {hook}(self, run):
        raise ValueError("it failed")
"""


def spying(box: Sandbox, hook: str = "") -> None:
    source = PLUGIN.format(keys=KEYS, info="settings=Keys") + (
        RAISES.format(hook=hook) if hook else ""
    )
    box.installed.add("spy", source)


def leaks(box: Sandbox, *texts: str) -> list[str]:
    """Return where the secret stands among all that the folder holds (but the config) and was said."""
    found = [
        str(path)
        for path in box.root.rglob("*")
        if path.is_file() and path.name not in ("c.json", "data.json")
        and SECRET.encode() in path.read_bytes()
    ]  # fmt: skip
    return found + [text for text in texts if SECRET in text]


@pytest.fixture
def planted(box, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    box.write({"spy_token": SECRET, "compress_disk_cache": False, "validation_prompt": "x",
               "validation_step_interval": 1})  # fmt: skip
    return box


def test_a_run_leaves_no_secret_behind(planted):
    spying(planted)
    answer = planted.run("--plugins", "tiny,spy")
    assert answer.code == 0, answer.err
    assert leaks(planted, answer.out, answer.err) == []
    settings = json.loads((planted.root / "output" / "settings.json").read_text())
    assert settings["settings"]["spy_token"] == "***"
    checkpoint = planted.root / "output" / "checkpoint-2" / "settings.json"
    assert json.loads(checkpoint.read_text())["settings"]["spy_token"] == "***"


@pytest.mark.parametrize("hook", ["describe_model", "load_model", "validate"])
def test_an_error_shows_no_secret(hook, planted):
    spying(planted, hook)
    answer = planted.run("--plugins", "tiny,spy")
    text = answer.out + answer.err
    assert "it failed" in text
    assert "spy" in text
    assert leaks(planted, answer.out, answer.err) == []


@pytest.mark.parametrize(
    ("keys", "args"),
    [
        ({"spy_token": [SECRET]}, ()),
        ({"spy_token": {"a": SECRET}}, ()),
        ({"spy_token": f"{SECRET}\0"}, ()),
        ({"spy_tokn": SECRET}, ()),
        ({"hub_token": SECRET, "webhook_url": f"https://x/{SECRET}", "spy_n": "x"}, ()),
        ({"spy_n": "x"}, ("--spy_token", SECRET)),
        ({}, ("--wandb_api_key", SECRET)),
    ],
)
def test_a_refused_setting_shows_no_secret(keys, args, planted):
    spying(planted)
    planted.write(keys)
    answer = planted.check("--plugins", "tiny,spy", *args)
    assert answer.code == 2
    assert leaks(planted, answer.out, answer.err) == []


def test_a_password_in_a_data_path_is_never_shown(planted):
    spying(planted)
    for place in (f"s3://me:{SECRET}@host/clips", f"https://me:{SECRET}@host/clips?token={SECRET}"):
        planted.write(entries=[{**ENTRY, "instance_data_dir": place}])
        answer = planted.check()
        assert answer.code == 2
        assert leaks(planted, answer.out, answer.err) == []
