"""The embedded language model: its tokenizer, its files, and how it is made. What is made here is tiny."""
import json
import shutil

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from llmlab.foundations import pretrain
from llmlab.kit import corpora, data, models, store
from llmlab.kit.settings import Damaged, Unavailable, UsageError

SHIPPED = [n for n in ("lm", "lm-small") if (models.Path(models.__file__).parents[1]/models.EMBEDDED[n][1]).is_dir()]


@pytest.fixture(scope="module")
def tokenizer(): return models.load("embedded:lm", "causal-lm").tokenizer


@given(st.text(max_size=60))
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if any(o in text for o in pretrain.SPECIAL): return
    assert tokenizer.decode(ids) == text and max(ids, default=0) < 4096


def test_the_tokenizer_begins_with_its_first_token_and_splits_digits(tokenizer):
    assert len(tokenizer) == 4096 and tokenizer.convert_ids_to_tokens(list(range(7))) == list(pretrain.SPECIAL)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id and tokenizer.tokenize("2026") == list("2026")
    with pytest.raises(UsageError, match="vocab_size=10 is out of range"): pretrain.train_tokenizer(["a"], 10)


def test_a_tokenizer_is_the_same_each_time():
    texts = data.load("embedded:docstrings-networkx", "test")["text"][:4]
    one, two = (pretrain.train_tokenizer(texts, 400) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_library_loads_it_with_nothing_of_ours(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = models.source(f"embedded:{name}", "causal-lm")
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama" and model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 512
    assert (folder/"model.safetensors").stat().st_size <= 13e6
    x = tok("Returns\n-------\n", return_tensors="pt")
    out = model.generate(input_ids=x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=8, do_sample=False)
    assert out.shape[1] > x["input_ids"].shape[1] and model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_pair_shares_its_tokenizer():
    if len(SHIPPED) < 2: pytest.skip("the smaller model is not in this checkout")
    one, two = (models.load(f"embedded:{n}", "causal-lm").tokenizer for n in SHIPPED)
    assert one.get_vocab() == two.get_vocab()


def copied(tmp_path, monkeypatch):
    folder = tmp_path/"llmlab"/"assets"/"lm"
    shutil.copytree(models.source("embedded:lm", "causal-lm"), folder)
    (tmp_path/"copy_of_llmlab").mkdir()
    (tmp_path/"copy_of_llmlab"/"__init__.py").touch()
    shutil.move(folder, tmp_path/"copy_of_llmlab"/"lm")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(models.EMBEDDED, "lm", ("copy_of_llmlab", "lm", None, None))
    return tmp_path/"copy_of_llmlab"/"lm"


def test_an_altered_model_is_refused(tmp_path, monkeypatch, fresh_home):
    folder = copied(tmp_path, monkeypatch)
    models.load("embedded:lm", "causal-lm")
    weights = bytearray((folder/"model.safetensors").read_bytes())
    weights[-100] ^= 1
    (folder/"model.safetensors").write_bytes(weights)
    with pytest.raises(Damaged, match="model.safetensors is .* bytes with hash"): models.load("embedded:lm", "causal-lm")
    (folder/"model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(Damaged, match="not the model that was published"): models.load("embedded:lm", "causal-lm")
    (folder/"made.json").write_text("{")
    with pytest.raises(Damaged, match=r"made.json cannot be read"): models.load("embedded:lm", "causal-lm")
    shutil.rmtree(folder)
    with pytest.raises(Unavailable, match="embedded:lm is not in"): models.load("embedded:lm", "causal-lm")


@pytest.fixture(scope="module")
def read_once():
    "What reading the libraries made: a fresh store may look at it, since it takes a minute to make again."
    docstrings = store.build(corpora.docstrings, progress=False)
    return [docstrings.path, store.build(corpora.running_text, source=docstrings).path]


@pytest.mark.filterwarnings("ignore")
def test_the_command_makes_a_model_that_loads_and_goes_on_where_it_was_stopped(read_once, tmp_path, monkeypatch, fresh_home, capsys):
    few, whole = {}, data.load
    def load(name, split=None, limit=0, **more):
        if name not in few: few[name] = {o: whole(name, o, limit=30 if o == "train" else 4) for o in ("train", "validation", "test")}
        return few[name][split]
    for p in read_once: (fresh_home/"store").mkdir(parents=True, exist_ok=True); (fresh_home/"store"/p.name).symlink_to(p)
    monkeypatch.setattr(pretrain.data, "load", load)
    monkeypatch.setitem(pretrain.SHAPES, "lm", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48))
    how = ["lm", "--steps", "4", "--folder", str(tmp_path/"run"), "--out", str(tmp_path/"lm"), "--threads", "1"]
    pretrain.main(how)
    info = json.loads((tmp_path/"lm"/"made.json").read_text())
    score = info["scores"]["embedded:docstrings"]
    assert info["tokens"] == 4 * 16 * 512 and score["documents"] == 4 == len(score["nats"])
    assert not models.wrong_files(tmp_path/"lm", info["files"]) and "bits a byte" in capsys.readouterr().out
    first = models.load(str(tmp_path/"lm"), "causal-lm")
    pretrain.main(how)  # complete: scored and written again, not trained again
    second = models.load(str(tmp_path/"lm"), "causal-lm")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
