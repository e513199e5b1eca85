"""Wrong settings end in an error that names the value and what would be right."""
import json
import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TOP, notebooks
from llmlab.kit import settings as module
from llmlab.kit.settings import Settings, Unavailable, UsageError, budget_s, contained, home, profiles, resolve_device, settings

INI = (TOP/"settings.ini").read_text("utf-8")
PROFILES = ["smoke", "tiny", "thorough", "classic", "gpu", "gpu-offline", "multi-gpu"]


@pytest.fixture
def ini(tmp_path):
    "Writes a settings file of the test's own and returns its path."
    def make(text, encoding="utf-8"):
        (tmp_path/"settings.ini").write_bytes(text.encode(encoding))
        return tmp_path/"settings.ini"
    return make


def test_profiles_are_those_of_the_readme():
    assert profiles() == PROFILES
    readme = (TOP/"README.md").read_text("utf-8")
    for p in PROFILES: assert f"`{p}`" in readme


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid(profile):
    s = settings(profile, resolve=False)
    assert s.profile == profile and set(s.sources) == {f.name for f in fields(Settings)} - {"sources"}
    assert budget_s("kit/settings", profile) > 0
    for text in (str(s), s._repr_html_()):
        for name in s.sources: assert name in text


@pytest.mark.parametrize("call,says", [
    (lambda: settings("tinny"), "Did you mean tiny"),
    (lambda: settings("tiny", pares=3), "Did you mean pairs"),
    (lambda: settings("tiny", seed=-1), "seed=-1 (you) is out of range: 0 to"),
    (lambda: settings("tiny", seed="abc"), "seed='abc'"),
    (lambda: settings("tiny", pairs=1), "pairs=1 (you) is out of range"),
    (lambda: settings("tiny", resamples=10**9), "out of range"),
    (lambda: settings("tiny", batch_sizes="1 0"), "batch_sizes=0 (you) is out of range"),
    (lambda: settings("tiny", batch_sizes=[]), "is empty"),
    (lambda: settings("tiny", evidence="perhaps"), "evidence='perhaps'"),
    (lambda: settings("tiny", dtype="float8"), "unknown dtype 'float8'"),
    (lambda: settings("tiny", device="gpu"), "unknown device 'gpu'"),
    (lambda: settings("tiny", device="cuda:x"), "unknown device 'cuda:x'"),
    (lambda: budget_s("kit/settings", "tinny"), "Did you mean tiny"),
])
def test_wrong_usage(call, says):
    with pytest.raises(UsageError, match=re.escape(says)) as e: call()
    assert e.value.exit_status == 2


def test_a_device_that_is_not_here():
    with pytest.raises(Unavailable, match="cuda:93.*Here:.*cpu") as e: resolve_device("cuda:93")
    assert e.value.exit_status == 4


@pytest.mark.parametrize("text,says", [
    ("", "lacks"), ("[DEFAULT\nseed = 0", "cannot be read"), ("seed = 0", "cannot be read"), (INI + "\n[tiny]\n", "cannot be read"),
    (INI.replace("pairs  ", "pears  "), "unknown key 'pears'. Did you mean pairs"), (INI.replace("seed            = 0", ""), "lacks 'seed'"),
    (INI.replace("= 2000", "= many"), "resamples='many'"), (INI[:INI.index("[thorough]")], "unknown profile 'gpu'"), (INI[:INI.index("pairs  ")], "lacks"),
    (INI.replace("budget_s        = 60", "budget_s = soon"), "budget_s"),
], ids=["empty", "header", "no section", "twice", "unknown key", "lacks a key", "not a number", "cut at a section", "cut in a section", "budget"])
def test_a_damaged_settings_file(text, says, ini):
    file = ini(text)
    with pytest.raises(UsageError, match=re.escape(says)):
        settings("gpu", file=file, resolve=False)
        settings("tiny", file=file, resolve=False)
        for p in profiles(file): budget_s("kit/settings", p, file=file)


def test_a_settings_file_that_is_no_text_or_missing(ini, tmp_path):
    with pytest.raises(UsageError, match="git checkout settings.ini"): settings("tiny", file=ini(INI + "# é", "utf-16"), resolve=False)
    with pytest.raises(UsageError, match="missing"): settings("tiny", file=tmp_path/"none.ini", resolve=False)


def test_an_edited_file_is_read_again(ini):
    assert settings("tiny", file=ini(INI), resolve=False).pairs == 15
    assert settings("tiny", file=ini(INI.replace("pairs           = 15", "pairs           = 150")), resolve=False).pairs == 150


def test_who_set_a_value():
    s = settings("smoke", pairs=40, warmup="", encoder=None, resolve=False)
    assert (s.sources["pairs"], s.sources["warmup"], s.sources["encoder"]) == ("you", "profile smoke", "default")


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 65_536), min_size=1, max_size=8), st.booleans())
def test_a_value_in_range_is_kept_from_text_too(seed, sizes, evidence):
    a = settings("tiny", seed=seed, batch_sizes=sizes, evidence=evidence, resolve=False)
    b = settings("tiny", seed=str(seed), batch_sizes=" ".join(map(str, sizes)), evidence="yes" if evidence else "no", resolve=False)
    assert a == b and (a.seed, a.batch_sizes, a.evidence) == (seed, tuple(sizes), evidence)


@given(st.text(max_size=20))
def test_no_text_breaks_the_reader(text):
    for key in ("profile", "seed", "device", "batch_sizes"):
        try: settings(text, resolve=False) if key == "profile" else settings("tiny", **{key: text}, resolve=False)
        except UsageError as e: assert str(e)


def test_settings_are_frozen():
    with pytest.raises(AttributeError): settings("tiny", resolve=False).seed = 1


def test_where_things_are(fresh_home, monkeypatch):
    assert home() == fresh_home.resolve()
    for k in list(contained()): monkeypatch.delenv(k, raising=False)
    assert all(v.startswith(str(fresh_home.resolve())) for v in contained().values())
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    assert "MPLCONFIGDIR" not in contained(), "what the user has set stays"
    monkeypatch.delenv("LLMLAB_HOME")
    assert home() == TOP/".llmlab"
    monkeypatch.setattr(module, "checkout", lambda: None)
    assert home().name == "llmlab" and not home().is_relative_to(TOP)


@pytest.mark.skipif(not list(TOP.glob("nbs/0*_*")), reason="no chapter yet")
@pytest.mark.parametrize("key", [f.name for f in fields(Settings) if f.name not in ("profile", "sources")])
def test_every_setting_is_used(key):
    used = re.compile(rf"""\b(s|\w*settings)\.{key}\b|values\["{key}"\]""")
    code = ["".join(c["source"]) for n in notebooks() for c in json.loads((TOP/n).read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    assert any(used.search(c) for c in code), f"no notebook uses {key}"


def test_a_budget_is_the_nearest_one(tmp_path):
    ini = tmp_path/"settings.ini"
    text = (TOP/"settings.ini").read_text()
    head = "\n".join(line for line in text.split("[smoke]")[0].splitlines() if not line.startswith("budget_s"))
    ini.write_text(f"{head}\nbudget_s = 10\nbudget_s.a/b = 20\n[plain]\n[long]\nbudget_s = 30\n[own]\nbudget_s = 30\nbudget_s.a/b = 40\n")
    assert [budget_s(n, p, ini) for p in ("plain", "long", "own") for n in ("a/b", "a/c")] == [20, 10, 30, 30, 40, 30]

def test_idle_talk_of_libraries_is_left_out_and_the_rest_is_heard(caplog):
    import logging
    settings("smoke", resolve=False); settings("smoke", resolve=False)
    log = logging.getLogger("torchao")
    log.warning("Failed to load /a/path/_C.so: no CUDA here"); log.warning("something else")
    assert [r.getMessage() for r in caplog.records] == ["something else"] and len(log.filters) == 1
