"""The functions of the selection chapter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hub import Hub
from llmlab.kit import data, models, stats, store
from llmlab.kit.settings import Unavailable, settings
from llmlab.selection import candidates as c


@pytest.mark.parametrize("C", [.1, 10.])
def test_softmax_regression_finds_what_scikit_learn_finds(C):
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 5, generator=g, dtype=torch.float64), torch.randint(3, (120,), generator=g)
    W, b = c.softmax_regression(x, y, 3, C=C)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(torch.softmax(x @ W.T + b, 1).numpy(), theirs.predict_proba(x.numpy()), atol=1e-4)


@examples(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3))
def test_sentence_vectors_do_not_see_padding(tokens, padding):
    g = torch.Generator().manual_seed(tokens)
    hidden = [torch.randn(2, tokens + padding, 6, generator=g) for _ in range(4)]
    mask = torch.tensor([[1] * tokens + [0] * padding] * 2)
    output = SimpleNamespace(hidden_states=hidden, pooler_output=torch.ones(2, 6))
    got = c.sentence_vectors(output, mask, layers=(1, 3))
    torch.testing.assert_close(got, torch.cat([hidden[1][:, :tokens].mean(1), hidden[3][:, :tokens].mean(1), torch.ones(2, 6)], 1))
    assert c.sentence_vectors(output, mask, layers=(2,), pooler=False).shape == (2, 6)


def test_majority_is_the_most_frequent_class():
    m = c.majority(np.array([2, 0, 2, 1]))
    assert m.predict(["a", "b"]).tolist() == [2, 2] and m.loaded is None and m.size_bytes > 0


def test_the_choice_of_C_asks_the_validation_data():
    class Fake:
        def __init__(self, C): self.C = C
        def fit(self, x, y): return self
        def score(self, x, y): return {1: .2, 2: .9, 3: .5}[self.C] if x == "validation" else 1 / self.C
    assert c.fit_best(Fake, ("train", None), ("validation", None), grid=(1, 2, 3)).C == 2


@pytest.mark.parametrize("flops", [1e3, 1e6, 3e9])
def test_bare_matmuls_have_the_operations_asked_for(flops):
    from torch.utils.flop_counter import FlopCounterMode
    run = c.matmuls(flops)
    with FlopCounterMode(display=False) as counter: run()
    n = 32 if flops < 2 * 32 ** 3 else None
    assert counter.get_total_flops() == 2 * 32 ** 3 if n else abs(counter.get_total_flops() / flops - 1) < .35


def test_python_calls_are_counted_and_the_profiler_is_put_back():
    import sys
    before = sys.getprofile()
    few, many = c.python_calls(lambda: len("a")), c.python_calls(lambda: [len("a") for _ in range(100)])
    assert many - few >= 90 and sys.getprofile() is before
    with pytest.raises(ZeroDivisionError): c.python_calls(lambda: 1 / 0)
    assert sys.getprofile() is before


def test_the_knee_is_the_smallest_batch_that_reaches_the_share():
    rates = {1: 10., 2: 19., 4: 33., 8: 40., 16: 39.}
    assert c.knee(rates) == 4 and c.knee(rates, share=.99) == 8 and c.knee({1: stats.exact(3.)}) == 1


def test_no_challenger_is_said_and_not_replaced(tmp_path):
    s = settings("smoke", challenger="none", device="cpu", out_dir=tmp_path)
    with pytest.raises(Unavailable, match="challenger"): c.challenge(s, ([], []), ([], []))


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    s = settings("smoke", challenger="hub:nobody/nothing", device="cpu", out_dir=tmp_path)
    with pytest.raises(Unavailable, match="embedded:minilm"): c.challenge(s, ([], []), ([], []))


def test_a_recipe_has_the_same_key_in_its_notebook_and_in_its_module():
    arguments = dict(encoder="random:bert-tiny", task="embedded:parameter-type", made_from="x", layers=(1, 2), pooler=True, limits={})
    in_notebook = store.Recipe(c.features.make, c.features.name.rpartition(".")[2], c.features.version, c.features.uses)
    assert store.key(c.features, **arguments | dict(made_from="y")) != store.key(c.features, **arguments)  # other data, other features
    assert store.key(in_notebook, **arguments) == store.key(c.features, **arguments)


@pytest.mark.parametrize("encoder,pooler", [("random:bert-tiny", True), ("random:distilbert", False)])
def test_features_ask_for_a_pooler_only_where_there_is_one(encoder, pooler, tmp_path):
    asked = c.features_of(settings("smoke", device="cpu", out_dir=tmp_path), encoder)
    assert asked["pooler"] is pooler and asked["layers"] == ((1, 2) if pooler else (3, 6))


def test_a_challenger_from_a_hub_that_answers(fresh_home, tmp_path, monkeypatch):
    rows = [f"{word} {i},{label},m{i},{split}" for split in ("train", "validation", "test") for i in range(4)
            for word, label in (("number", "int"), ("word", "str"))]
    (tmp_path/"types.csv").write_text("\n".join(["text,label,module,split", *rows]) + "\n")
    model = models.load("random:bert-tiny")
    files = {f.name: f.read_bytes() for f in models.save(model, tmp_path/"tiny").iterdir()}
    with Hub() as hub:
        hub.add("we/tiny", files)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        s = settings("smoke", challenger="hub:we/tiny", task=str(tmp_path/"types.csv"), device="cpu", out_dir=tmp_path)
        splits = [data.load(s.task, split) for split in ("train", "validation")]
        candidate, test_vectors = c.challenge(s, *((list(d["text"]), np.array(d["label"])) for d in splits))
    assert candidate.loaded.name == "hub:we/tiny" and test_vectors.shape == (8, 128)
    assert candidate.predict(["number 1", "word 2"]).shape == (2,) and candidate.size_bytes > 4 * candidate.loaded.n_parameters
