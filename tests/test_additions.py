"""Small files beside a base: whose they are, and what happens when a save breaks off."""
import os

import pytest
import torch
from safetensors.torch import save_file

from llmlab.kit import additions, compression, models
from llmlab.kit.settings import Damaged, Unavailable, UsageError


@pytest.fixture(scope="module")
def llama(): return models.load("random:llama-tiny", task="causal-lm")


def test_one_changed_value_is_another_base(llama):
    first, copy = additions.fingerprint(llama), compression.copied(llama)
    assert first == additions.fingerprint(copy)
    for name, p in [*copy.model.named_parameters()][::7]:
        with torch.no_grad(): p.view(-1)[-1] += 1e-3
        assert additions.fingerprint(copy) != first, name
        with torch.no_grad(): p.view(-1)[-1] = dict(llama.model.named_parameters())[name].view(-1)[-1]
    assert additions.fingerprint(copy) == first


def test_the_type_counts_and_the_head_of_a_language_model_too(llama):
    half = models.load("random:llama-tiny", task="causal-lm", dtype="bfloat16")
    assert additions.fingerprint(half) != additions.fingerprint(llama)
    gpt = models.load("random:bert-tiny", task="classifier", n_labels=2)
    assert additions.fingerprint(gpt) == additions.fingerprint(models.load("random:bert-tiny", task="classifier", n_labels=5))


def test_what_is_put_beside_is_skipped(llama):
    copy = compression.copied(llama)
    copy.model.beside = torch.nn.Linear(2, 2)
    assert additions.fingerprint(copy) != additions.fingerprint(llama)
    assert additions.fingerprint(copy, lambda n: n.startswith("beside.")) == additions.fingerprint(llama)


def test_types_and_views_survive(llama, tmp_path):
    given = dict(a=torch.arange(6.).view(2, 3).t(), b=torch.ones(2, dtype=torch.bfloat16), c=torch.zeros(0, 3))
    additions.save(given, tmp_path/"new"/"folder", llama, "w", size=3, names=["ä"])
    back, about = additions.load(tmp_path/"new"/"folder", llama, "w")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in given.items())
    assert about == dict(base="random:llama-tiny", dtype="float32", weights="w", size=3, names=["ä"])
    (tmp_path/"new"/"folder"/additions.FILE).write_bytes(b"x" * 400)  # in place, not renamed
    assert torch.equal(back["a"], given["a"]), "the tensors lie in the file"


def test_an_interrupted_save_leaves_what_was_there(llama, tmp_path, monkeypatch):
    additions.save(dict(a=torch.zeros(4)), tmp_path, llama, "w")
    def full(*args): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(Unavailable, match="No space left.*still there"): additions.save(dict(a=torch.ones(4)), tmp_path, llama, "w")
    assert additions.load(tmp_path, llama, "w")[0]["a"].sum() == 0 and [p.name for p in tmp_path.iterdir()] == [additions.FILE]
    class Killed(BaseException): pass
    def killed(*args): raise Killed
    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(Killed): additions.save(dict(a=torch.ones(4)), tmp_path, llama, "w")
    assert additions.load(tmp_path, llama, "w")[0]["a"].sum() == 0


def test_a_cut_file_is_named(llama, tmp_path):
    additions.save(dict(a=torch.zeros(4)), tmp_path, llama, "w")
    whole = (tmp_path/additions.FILE).read_bytes()
    for n in (0, 5, 40, len(whole) - 1):
        (tmp_path/additions.FILE).write_bytes(whole[:n])
        with pytest.raises(Damaged, match="adapter.safetensors cannot be read"): additions.load(tmp_path, llama, "w")


def test_others_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="holds no adapter"): additions.load(tmp_path, llama, "w")
    save_file(dict(a=torch.zeros(4)), tmp_path/additions.FILE)
    with pytest.raises(UsageError, match="does not say which base"): additions.load(tmp_path, llama, "w")
    additions.save(dict(a=torch.zeros(4)), tmp_path, llama, "w")
    with pytest.raises(UsageError, match="trained on random:llama-tiny .* not those of random:llama-tiny"): additions.load(tmp_path, llama, "v")


def test_a_target_is_a_name_or_the_end_of_one(llama):
    assert len(compression.targeted(llama, "q_proj")) == 6
    assert [p.name for p in compression.targeted(llama, ["model.layers.1.mlp.up_proj"])] == ["model.layers.1.mlp.up_proj"]
    for wrong in (["q_prj"], [], ["lm_head"], ["model.layers.9.mlp.up_proj"], ["q_proj", "x"]):
        with pytest.raises(UsageError, match="matches no matrix of random:llama-tiny. There are .*q_proj"): compression.targeted(llama, wrong)
