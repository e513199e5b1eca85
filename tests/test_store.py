"""The store: keys, one builder, and accidents."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
from hypothesis import given, settings, strategies as st

from llmlab.kit import store
from llmlab.kit.settings import Unavailable, UsageError

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)

QUICK = settings(deadline=None, max_examples=40)


@store.recipe()
def write(folder, *, a, b=0, c=None, size=10):
    (folder/"deep").mkdir()
    (folder/"deep"/"file.bin").write_bytes(b"x" * size)
    return dict(a=a, loss=[1.0, float("nan")])


def make(body, name="made", **more):
    "A recipe from source text."
    import linecache
    text = textwrap.dedent(f"def {name}(folder, *, n=1):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n")
    file = f"<recipe {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space = {}
    exec(compile(text, file, "exec"), space)
    return store.recipe(**more)(space[name])


# Keys

@QUICK
@given(a=VALUES, b=VALUES, c=VALUES)
def test_order_of_arguments_does_not_matter(a, b, c):
    assert store.key(write, a=a, b=b, c=c) == store.key(write, c=c, b=b, a=a)


@QUICK
@given(a=VALUES, b=VALUES, other=VALUES)
def test_every_value_matters(a, b, other):
    same = json.dumps(a, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (store.key(write, a=a, b=b) == store.key(write, a=other, b=b)) == same


@QUICK
@given(a=VALUES, b=VALUES)
def test_which_argument_has_a_value_matters(a, b):
    if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True): assert store.key(write, a=a, b=b) != store.key(write, a=b, b=a)


def test_types_that_python_calls_equal_differ():
    assert len({store.key(write, a=v) for v in (1, 1.0, True, "1", [1], {"1": 1}, None, "")}) == 8


def test_defaults_and_tuples_are_the_same_thing_written_otherwise():
    assert store.key(write, a=(1, 2)) == store.key(write, a=[1, 2], b=0, size=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), {1: 2}, b"x", [float("nan")], {"a": {"b": open}}])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(UsageError, match="cannot enter a key"): store.key(write, a=value)


def test_wrong_arguments_are_refused_before_anything_runs(fresh_home):
    with pytest.raises(UsageError, match="Did you mean size"): store.build(write, a=1, sise=3)
    with pytest.raises(UsageError, match="lacks a"): store.build(write)
    with pytest.raises(UsageError, match="not a recipe"): store.build(print)
    assert not fresh_home.exists()


def test_source_enters_the_key_and_comments_do_not():
    a, b, c = make("return dict(n=n)"), make("# a comment\nreturn  dict( n = n )"), make("return dict(n=n + 1)")
    assert store.key(a) == store.key(b) != store.key(c)


def test_helpers_and_constants_enter_the_key_and_nothing_else(tmp_path, monkeypatch):
    import importlib
    text = """
import re
from dataclasses import dataclass
from llmlab.kit import store
PATTERN, TABLE, OTHER, seed = re.compile("a+"), {"x": (1, {2, 3})}, 1, 2
class Base:
    def sign(self): return "-"
@dataclass
class Part(Base):
    size: int = 1
    WIDTH = 3
    @property
    def twice(self): return inner(self.size)
def inner(x): return x * 2
class Unused: pass
def helper(x): return [deep(o) for o in x] + [Part().twice]
def deep(x): return TABLE
def unused(): return 1
@store.recipe()
def made(folder, *, n=1): return dict(a=[PATTERN.sub("", str(o.seed)) for o in helper([n])])
"""
    monkeypatch.syspath_prepend(tmp_path)
    def key(i, old="", new=""):
        (tmp_path/f"changing{i}.py").write_text(text.replace(old, new) if old else text)
        importlib.invalidate_caches()
        return store.key(importlib.import_module(f"changing{i}").made)
    same = key(0)
    for i, (old, new) in enumerate([("1, 2\n", "5, 6\n"), ("return 1", "return 2"), ("def helper(x): ", "def helper(x):  # why\n  "),
            ("class Unused: pass", "class Unused: x = 1")], 1):
        assert key(i, old, new) == same, old
    for i, (old, new) in enumerate([('"a+"', '"b+"'), ("{2, 3}", "{2, 4}"), ("return TABLE", "return (TABLE)[0]"), ("deep(o)", "deep(0)"),
            ("x * 2", "x * 3"), ("WIDTH = 3", "WIDTH = 4"), ('return "-"', 'return "+"'), ("inner(self.size)", "inner(1)"), ("Part(Base)", "Part")], 11):
        assert key(i, old, new) != same, old


def test_version_uses_and_device_enter_the_key():
    other = make("return dict(n=2)", "other")
    keys = [store.key(make("return {}", **o)) for o in (dict(), dict(version=2), dict(uses="numpy"), dict(uses=("numpy", "python")), dict(uses=other),
                                                        dict(uses=make("return dict(n=3)", "other")), dict(uses="module:llmlab.kit.settings"))]
    assert len(set(keys)) == len(keys)
    r = make("return {}")
    assert store.key(r) == store.key(r, device="cpu") != store.key(r, device="cuda:0") == store.key(r, device="cuda:1")


def test_version_of_a_library_enters_the_key(monkeypatch):
    from importlib import metadata
    r = make("return {}", uses="numpy")
    before = store.key(r)
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1")
    assert store.key(r) != before


def test_uses_that_are_not_there():
    with pytest.raises(Unavailable, match="pip install no-such-dist"): store.key(make("return {}", uses="no-such-dist"))
    with pytest.raises(UsageError, match="no_such_module"): store.key(make("return {}", uses="module:no_such_module"))


def test_an_artefact_as_an_argument_brings_its_key(fresh_home):
    one, two = store.build(write, a=1), store.build(write, a=2)
    assert store.key(write, a=one) == store.key(write, a=store.build(write, a=1)) != store.key(write, a=two)


# Building

def test_built_once_then_found(fresh_home):
    first, again = store.build(write, a=[1]), store.build(write, a=[1])
    assert first.built and not again.built and first == again
    assert (again/"deep/file.bin").read_bytes() == b"x" * 10 and again.size_bytes == 10
    assert again.notes == dict(a=[1], loss=[1.0, None])
    assert {"seconds", "peak_memory_bytes", "versions", "arguments", "recipe", "device", "made_at"} <= set(again.made)
    assert store.build(write, a=[1], fresh=True).built
    assert "write" in repr(again) and "deep/file.bin" in again._repr_html_()


def test_a_recipe_gets_device_and_progress_if_it_takes_them(fresh_home):
    @store.recipe()
    def asks(folder, *, device, progress, n=0): return dict(device=device, progress=progress)
    assert store.build(asks, device="cuda:1", progress=False).notes == dict(device="cuda:1", progress=False)


def test_a_recipe_that_fails_leaves_nothing(fresh_home):
    r = make('(folder/"half").write_text("x")\nraise KeyError("oops")')
    with pytest.raises(KeyError): store.build(r)
    assert store.artefacts() == [] and not any((fresh_home/"store"/".aside").iterdir())


DAMAGE = {
    "truncated": lambda f: (f/"deep/file.bin").write_bytes(b"x" * 9),
    "altered, same size": lambda f: (f/"deep/file.bin").write_bytes(b"y" * 10),
    "missing": lambda f: (f/"deep/file.bin").unlink(),
    "record missing": lambda f: (f/"made.json").unlink(),
    "record truncated": lambda f: (f/"made.json").write_text((f/"made.json").read_text()[:-30]),
    "record altered": lambda f: (f/"made.json").write_text((f/"made.json").read_text().replace('"size": 10', '"size": 11')),
    "record of another kind": lambda f: (f/"made.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damage_is_noticed_said_and_mended(fresh_home, damage):
    a = store.build(write, a=1)
    time.sleep(.01)  # the clock of some file systems is coarse
    DAMAGE[damage](a.path)
    with pytest.warns(UserWarning, match="damaged"): mended = store.build(write, a=1)
    assert mended.built and (mended/"deep/file.bin").read_bytes() == b"x" * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.build(write, a=1).built


def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_in_the_recipe_or_below_a_library(fresh_home):
    r = make('try: raise OSError(28, "No space left on device")\nexcept OSError as e: raise RuntimeError("writing failed") from e')
    with pytest.raises(Unavailable, match=r"bytes free") as e: store.build(r)
    assert str(fresh_home) in str(e.value) and e.value.exit_status == 4
    assert store.artefacts() == [] and not any((fresh_home/"store"/".aside").iterdir())


@pytest.mark.parametrize("step", ["json.dump", "os.rename", "os.fsync"])
def test_full_disk_while_the_store_writes(fresh_home, monkeypatch, step):
    module, name = step.split(".")
    with monkeypatch.context() as m:
        m.setattr(getattr(store, module), name, full)
        with pytest.raises(Unavailable, match="bytes free"): store.build(write, a=1)
    assert store.artefacts() == [] and store.build(write, a=1).built


FULL = """
from llmlab.kit import store
from llmlab.kit.settings import Unavailable
@store.recipe()
def write(folder, *, size): (folder/"file").write_bytes(b"x" * size)
try: store.build(write, size=8_000_000)
except Unavailable as e: print(e)
print(store.artefacts() == [], store.build(write, size=1000).built)  # what was half-written no longer takes room
"""


def test_a_really_full_disk(tmp_path):
    small = tmp_path/"small"
    small.mkdir()
    (tmp_path/"full.py").write_text(FULL)
    inside = f"mount -t tmpfs -o size=4m tmpfs {small} || exit 77; exec {sys.executable} {tmp_path/'full.py'}"
    if not shutil.which("unshare"): pytest.skip("needs `unshare` for a small file system of its own")
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], env=os.environ | {"LLMLAB_HOME": str(small), "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True)
    if "Operation not permitted" in done.stderr or done.returncode == 77: pytest.skip("needs the right to mount a small file system")
    assert "bytes free" in done.stdout and done.stdout.endswith("True True\n"), done.stdout + done.stderr


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path/"home"))
    monkeypatch.setattr(store.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    monkeypatch.setattr(store.os, "access", lambda *_: False)
    with pytest.raises(Unavailable, match="LLMLAB_HOME"): store.build(write, a=1)


# Several processes

SLOW = """
import os, sys, time
from pathlib import Path
from llmlab.kit import store
@store.recipe()
def slow(folder, *, seconds, log):
    with open(log, "a") as f: f.write("started\\n")
    (folder/"half").write_text("half")
    time.sleep(seconds)
    (folder/"whole").write_text("whole")
a = store.build(slow, progress=False, seconds=float(sys.argv[1]), log=sys.argv[2])
print(a.built, (a/"whole").read_text())
"""


def start(tmp_path, seconds):
    (tmp_path/"slow.py").write_text(SLOW)
    env = os.environ | {"LLMLAB_HOME": str(tmp_path/"home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, str(tmp_path/"slow.py"), str(seconds), str(tmp_path/"log")], env=env, stdout=subprocess.PIPE, text=True)


def test_two_processes_build_once(tmp_path):
    outs = [p.communicate(timeout=60)[0].split() for p in [start(tmp_path, 1.0) for _ in range(3)]]
    assert sorted(o[0] for o in outs) == ["False", "False", "True"] and {o[1] for o in outs} == {"whole"}
    assert (tmp_path/"log").read_text().count("started") == 1


def test_a_killed_builder_leaves_nothing_that_is_believed(tmp_path, monkeypatch):
    first = start(tmp_path, 30)
    deadline = time.monotonic() + 30
    while not list((tmp_path/"home/store/.aside").glob("*/half")) and time.monotonic() < deadline: time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path/"home"))
    assert store.artefacts() == [] and len(list((tmp_path/"home/store/.aside").iterdir())) == 1
    (tmp_path/"log").unlink()
    again = start(tmp_path, 30)  # the lock went with its holder, and the left-overs go now
    while not (tmp_path/"log").exists() and time.monotonic() < deadline + 30: time.sleep(.05)
    left = list((tmp_path/"home/store/.aside").iterdir())
    again.kill(); again.wait()
    assert len(left) == 1


# The shelf

def test_list_and_prune(fresh_home):
    assert store.artefacts() == []
    a, b, other = store.build(write, a=1), store.build(write, a=2), store.build(make('(folder/"f").write_text("abc")'))
    (b.path/"made.json").write_text("{")
    shelf = store.artefacts()
    assert {o.key for o in shelf} == {a.key, b.key, other.key} and "damaged" in repr(shelf) and "<table" in shelf._repr_html_()
    assert store.prune(older_than_days=1, recipe="made") == []
    assert [o.key for o in store.prune(recipe="made")] == [other.key]
    assert [o.key for o in store.prune(keys=[a.key])] == [a.key] and not a.path.exists()
    with pytest.raises(UsageError, match="unknown key"): store.prune(keys=["nope"])
    with pytest.raises(UsageError, match="say what to remove"): store.prune()
    assert len(store.prune(all=True)) == 1 and store.artefacts() == []


@QUICK
@given(st.integers(0, 5))
def test_keys_are_stable_between_processes(n):
    assert store.key(write, a=n) == store.key(write, a=n) and len(store.key(write, a=n)) == 20
    assert set(store.key(write, a=n)) <= set("0123456789abcdef")


def test_hash_seed_does_not_enter_the_key(tmp_path):
    (tmp_path/"k.py").write_text("from llmlab.kit import store\n@store.recipe(uses='numpy')\ndef f(folder, *, a): return {}\n"
                                 "print(store.key(f, a=dict(x=1, y=[2.5])))\n")
    def run(seed):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, str(tmp_path/"k.py")], env=env, capture_output=True, text=True, check=True).stdout
    assert run("0") == run("1") != ""
