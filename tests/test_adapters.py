"""Adapters: what a reader need not see."""
import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from llmlab.finetuning import adapters, lora
from llmlab.kit import additions, compression, models, training
from llmlab.kit.models import Loaded
from llmlab.kit.settings import Damaged, UsageError, settings
from test_compression import TINY, drawn

FAMILIES = {"bert-tiny": "classifier", "gpt2-tiny": "causal-lm", "llama-tiny": "causal-lm", "qwen-tiny": "causal-lm"}


@pytest.fixture(scope="module")
def loaded():
    from transformers import DistilBertConfig
    small = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=259, max_position_embeddings=64, num_labels=3)
    made = {k: models.load(f"random:{k}", task=t, n_labels=3 if t == "classifier" else None) for k, t in FAMILIES.items()}
    return made | {"distilbert": drawn(small, "classifier")}


@pytest.fixture(scope="module")
def bert(loaded): return loaded["bert-tiny"]


@pytest.fixture
def ids(): return torch.arange(4, 36).view(2, 16)


def said(m, ids):
    with torch.inference_mode(): return m.model(input_ids=ids).logits


def shaken(m, task, seed=0):
    "With weights in the adapters of a task, as after training."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.model.bank.tasks[task].parameters(): p.normal_(0, .2, generator=g)
    return m


# the formula, on every family

def by_hand(m, placement, task):
    "The same adapters on a fresh copy of the base, by hooks written down once more from the papers."
    plain = compression.copied(adapters.use(m))
    adapters.use(m, task)
    plain.model.bank = None
    for module in plain.model.modules(): module._forward_hooks.clear()
    parts = {k.replace("/", "."): p for k, p in m.model.bank.tasks[task].items()}
    f = F.gelu if placement == "houlsby" else F.relu
    for name, part in parts.items():
        site = plain.model.get_submodule(name)
        if not isinstance(part, adapters.Bottleneck): compression.set_module(plain.model, name, part); continue
        A = lambda h, part=part: F.linear(f(F.linear(h, part.down.weight, part.down.bias)), part.up.weight, part.up.bias)
        if isinstance(site, nn.LayerNorm):
            norm = lambda x, site=site: F.layer_norm(x, site.normalized_shape, site.weight, site.bias, site.eps)
            site.register_forward_hook(lambda mod, i, o, A=A, norm=norm: norm(A(norm(i[0])) + i[0]))
        else: site.register_forward_hook(lambda mod, i, o, A=A: o + A(o))
    return plain


@pytest.mark.parametrize("placement", adapters.PLACEMENTS)
@pytest.mark.parametrize("family", [*FAMILIES, "distilbert"])
def test_every_family_begins_at_the_base_and_follows_the_formula(loaded, family, placement, ids):
    base = loaded[family]
    m, changes = adapters.add_adapter(base, "one", 8, placement)
    n_layer = len(models.layers_of(base))
    bottlenecks = [p for p in m.model.bank.tasks["one"].values() if isinstance(p, adapters.Bottleneck)]
    assert len(bottlenecks) == n_layer * (2 if placement == "houlsby" else 1) and len(changes) == len(m.model.bank.tasks["one"])
    assert torch.equal(said(adapters.use(m), ids), said(base, ids))
    hidden = lambda o: o.model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    with torch.inference_mode():
        for a, b in zip(hidden(adapters.use(m, "one")), hidden(base)): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    shaken(m, "one")
    torch.testing.assert_close(said(m, ids), said(by_hand(m, placement, "one"), ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said(m, ids), said(base, ids), atol=1e-2)
    assert torch.equal(said(adapters.use(m), ids), said(base, ids))
    with torch.inference_mode(): assert not torch.allclose(hidden(adapters.use(m, "one"))[1], hidden(base)[1]), "hidden states are those of the base"
    for n, p in m.model.named_parameters(): assert p.requires_grad == any(p is q for q in m.model.bank.tasks["one"].parameters()), n
    assert all(p.requires_grad for p in base.model.parameters()), "the original is frozen"


# last hidden states of the library: adapters 1.3.0, transformers 4.57.6; DoubleSeqBnConfig with GELU, SeqBnConfig
@pytest.mark.parametrize("family,placement,wanted", [
    ("gpt2", "houlsby", (.12723, .02484, -.02431, -.16322, .04745, .15395, .08588, .14129)),
    ("gpt2", "pfeiffer", (.21566, .13559, -.05307, -.1066, -.02696, .11839, .04591, .07801)),
    ("llama", "houlsby", (.60808, .71399, .37788, .7074, 1.4745, 1.59882, .92202, .2339)),
    ("llama", "pfeiffer", (.65797, .99628, .24103, .2109, 1.32477, 1.76935, .72984, -.46338))])
def test_it_says_what_adapterhub_says(family, placement, wanted):
    def written(named):
        for i, (n, p) in enumerate(named):
            one = ("norm" in n.lower() or ".ln_" in n) and n.endswith("weight")
            wave = torch.sin(torch.arange(p.numel()) * (.7 + .01 * i) + i).view(p.shape) * (.5 if p.ndim > 1 else .1)
            with torch.no_grad(): p.copy_(wave + (1. if one else 0.))
    m = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)) if family == "gpt2" else \
        LlamaModel(LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20, max_position_embeddings=16))
    written(m.eval().named_parameters())
    made, _ = adapters.add_adapter(Loaded(m, None, family, "random", "encoder"), "t", 2, placement)
    written(made.model.bank.tasks["t"].named_parameters())
    with torch.inference_mode(): found = made.model(input_ids=torch.tensor([[3, 5, 7, 11], [2, 4, 6, 8]])).last_hidden_state[0, -1]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_a_frozen_base_in_half_precision_keeps_its_type(ids):
    half = models.load("random:llama-tiny", task="causal-lm", dtype="bfloat16")
    m, _ = adapters.add_adapter(half, "one")
    assert torch.equal(said(m, ids), said(half, ids)) and next(m.model.bank.tasks["one"].parameters()).dtype == torch.float32
    assert said(shaken(m, "one"), ids).dtype == torch.bfloat16


# several tasks

def test_tasks_do_not_see_each_other(bert, ids):
    one, _ = adapters.add_adapter(bert, "one", 4, "houlsby")
    two, _ = adapters.add_adapter(bert, "two", 8, "pfeiffer", labels=["a", "b"], seed=1)
    shaken(one, "one", 1), shaken(two, "two", 2)
    alone = {"one": said(one, ids), "two": said(two, ids), "base": said(bert, ids)}
    both, _ = adapters.add_adapter(one, "two", 8, "pfeiffer", labels=["a", "b"])
    both.model.bank.tasks["two"].load_state_dict(two.model.bank.tasks["two"].state_dict())
    for task in ("two", "one", "base", "one", "two", "base"):
        assert torch.equal(said(adapters.use(both, task), ids), alone[task]), task
        assert both.model.config.num_labels == alone[task].shape[1] == both.model.num_labels
    assert adapters.base_fingerprint(both) == adapters.base_fingerprint(bert) == adapters.base_fingerprint(adapters.use(both, "two"))
    assert both.model.config.id2label == {0: "a", 1: "b"}


def test_a_copy_is_switched_by_itself(bert, ids):
    one, _ = adapters.add_adapter(bert, "one")
    shaken(one, "one")
    twin = compression.copied(one)
    before = said(one, ids)
    assert torch.equal(said(twin, ids), before)
    adapters.use(twin)
    assert torch.equal(said(one, ids), before) and torch.equal(said(twin, ids), said(bert, ids))
    again = copy.deepcopy(twin.model)
    again.bank.active = "one"
    assert not torch.equal(again.bert(input_ids=ids).last_hidden_state, twin.model.bert(input_ids=ids).last_hidden_state)


def rows(n=12, classes=2):
    words = ["one", "two", "three", "four"]
    return Dataset.from_dict(dict(text=[f"{words[i % classes]} text number {i}" for i in range(n)], label=[i % classes for i in range(n)]),
        features=Features(dict(text=Value("string"), label=ClassLabel(num_classes=classes))))


def test_training_moves_the_task_alone(bert, ids):
    one, _ = adapters.add_adapter(bert, "one")
    shaken(one, "one")
    both, _ = adapters.add_adapter(one, "two", labels=["a", "b"])
    before = {n: p.clone() for n, p in both.model.named_parameters()}
    done = training.fit(both, training.tokenized(rows(), bert.tokenizer), steps=2, batch_size=4, lr=1e-2).loaded
    moved = {n for n, p in done.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("bank.tasks.two.") or models.part_of(n) in ("head", "pooler") for n in moved)
    assert adapters.base_fingerprint(done) == adapters.base_fingerprint(bert)
    assert torch.equal(said(adapters.use(done, "one"), ids), said(one, ids)) and torch.equal(said(adapters.use(done), ids), said(bert, ids))
    free, _ = adapters.add_adapter(one, "two", labels=["a", "b"], freeze=False)
    moved = training.fit(free, training.tokenized(rows(), bert.tokenizer), steps=1, batch_size=4, lr=1e-2).loaded
    assert adapters.base_fingerprint(moved) != adapters.base_fingerprint(bert)


# what is counted

@pytest.mark.parametrize("size", [1, 7, 64])
def test_parameters_are_as_counted(loaded, size):
    for family, m in loaded.items():
        made, changes = adapters.add_adapter(m, "one", size, "houlsby")
        d, parts = m.model.config.hidden_size, [p for p in made.model.bank.tasks["one"].values() if isinstance(p, adapters.Bottleneck)]
        assert sum(p.numel() for o in parts for p in o.parameters()) == len(parts) * adapters.bottleneck_parameters(d, size), family
        assert changes.after_bytes == 4 * sum(p.numel() for p in made.model.bank.tasks["one"].parameters())


def test_activations_are_counted_for_encoders_only():
    assert adapters.kept_values(models.geometry("random:minilm"), "pfeiffer", 32) < adapters.kept_values(models.geometry("random:minilm"), "houlsby", 32)
    with pytest.raises(UsageError, match="no encoder"): adapters.kept_values(models.geometry("random:llama-tiny"))
    with pytest.raises(UsageError, match="Did you mean pfeiffer"): adapters.kept_values(models.geometry("random:minilm"), "pfeifer")


def test_no_pass_is_faster_than_without_a_third_of_its_products():
    for n in (1, 2, 6, 24): assert 1.5 <= adapters.pass_speedup(n, "houlsby") < adapters.pass_speedup(n) <= 3


# bad input

@pytest.mark.parametrize("given,message", [
    (dict(size=0), "at least 1"), (dict(placement="pfeifer"), "Did you mean pfeiffer"), (dict(placement=("fc2",)), "matches no matrix.*dense"),
    (dict(placement=()), "matches no matrix"), (dict(task=""), "cannot be the name"), (dict(task="a.b"), "without a dot"),
    (dict(task="base"), "cannot be the name")])
def test_bad_input_is_refused(bert, given, message):
    with pytest.raises(UsageError, match=message): adapters.add_adapter(bert, **dict(task="one") | given)


def test_an_unknown_family_is_refused_and_can_be_named(ids):
    opt = drawn(TINY["opt"]())
    with pytest.raises(UsageError, match="OPTDecoderLayer is none of.*placement="): adapters.add_adapter(opt, "one")
    m, _ = adapters.add_adapter(opt, "one", placement=("fc2", "out_proj"))
    assert torch.equal(said(m, ids), said(opt, ids)) and len(m.model.bank.tasks["one"]) == 4
    assert not torch.equal(said(shaken(m, "one"), ids), said(opt, ids))


def test_tasks_are_named_once_and_asked_for_by_name(bert):
    one, _ = adapters.add_adapter(bert, "one")
    with pytest.raises(UsageError, match="has the task 'one' already"): adapters.add_adapter(one, "one")
    with pytest.raises(UsageError, match="unknown task.*'ones'.*Did you mean one"): adapters.use(one, "ones")
    with pytest.raises(UsageError, match="has no adapters"): adapters.use(bert, "one")
    with pytest.raises(UsageError, match="has no adapters"): adapters.save_adapter(bert, "nowhere")


def test_labels_out_of_range_are_refused(bert):
    two, _ = adapters.add_adapter(bert, "two", labels=["a", "b"])
    told = lambda some: training.tokenized(some, bert.tokenizer)
    with pytest.raises(UsageError, match="the label 2 is out of range.*classes 0 … 1"): training.fit(two, told(rows(classes=3)), steps=1)
    with pytest.raises(UsageError, match="one class"): training.fit(two, told(rows().filter(lambda r: r["label"] == 0)), steps=1)


# files

def test_a_task_comes_back_from_its_file_onto_its_base_alone(bert, tmp_path, ids):
    one, _ = adapters.add_adapter(bert, "one", 4, "houlsby", labels=["x", "y"])
    shaken(one, "one")
    folder = adapters.save_adapter(one, tmp_path/"one")
    assert [p.name for p in folder.iterdir()] == [additions.FILE]
    n = sum(p.numel() for p in one.model.bank.tasks["one"].parameters())
    assert 4 * n < models.size_on_disk(folder) < 4 * n + 200 * len(one.model.bank.tasks["one"].state_dict()) + 600
    other_head = models.load("random:bert-tiny", task="classifier", n_labels=9, seed=0)
    for base in (bert, other_head):
        again = adapters.load_adapter(base, folder)
        assert torch.equal(said(again, ids), said(one, ids)) and again.model.config.id2label == {0: "x", 1: "y"}
    twice = adapters.load_adapter(adapters.load_adapter(bert, folder), folder, "the same")
    assert torch.equal(said(twice, ids), said(one, ids)) and torch.equal(said(adapters.use(twice, "one"), ids), said(one, ids))
    with pytest.raises(UsageError, match="already"): adapters.load_adapter(twice, folder)
    with pytest.raises(UsageError, match="trained on random:bert-tiny.*not those of random:bert-tiny"):
        adapters.load_adapter(models.load("random:bert-tiny", task="classifier", n_labels=3, seed=1), folder)
    with pytest.raises(UsageError, match="unknown task"): adapters.save_adapter(adapters.use(one), tmp_path/"base")
    (folder/additions.FILE).write_bytes((folder/additions.FILE).read_bytes()[:-1])
    with pytest.raises(Damaged, match="cannot be read"): adapters.load_adapter(bert, folder)


def test_lora_is_no_bottleneck(bert, tmp_path):
    lora.save_adapter(lora.add_lora(bert, r=2)[0], tmp_path)
    with pytest.raises(UsageError, match="no bottleneck adapter"): adapters.load_adapter(bert, tmp_path)


def test_a_language_model_has_no_head_of_its_own(loaded, tmp_path, ids):
    base = loaded["llama-tiny"]
    m, _ = adapters.add_adapter(base, "domain")
    assert all(isinstance(p, adapters.Bottleneck) for p in m.model.bank.tasks["domain"].values())
    again = adapters.load_adapter(base, adapters.save_adapter(shaken(m, "domain"), tmp_path))
    assert torch.equal(said(again, ids), said(m, ids))


# the plan

def test_every_profile_has_a_plan_without_doubles():
    for profile in ("smoke", "tiny", "thorough"):
        made = adapters.plan(settings(profile, device="cpu"))
        assert {r.name for r, _ in made.values()} == {"classifier", "adapted", "unfrozen"}
        seeds = 3 if profile == "thorough" else 1
        assert sum("adapter, seed" in name for name in made) == sum("full, seed" in name for name in made) == 2 * seeds
    assert adapters.two_tasks(settings("tiny", task="embedded:docstring-library", device="cpu"))[1] == "embedded:parameter-type"


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("shape", [(8, 16), (4, 64)])
def test_memory_of_training_steps_is_foretold(placement, shape):
    m = models.load("random:minilm", task="classifier", n_labels=3)
    g = models.geometry(m)
    assert g.dropout and g.hidden_dropout
    made, _ = adapters.add_adapter(m, "task", 16, placement)
    batch = dict(input_ids=torch.full(shape, 5), attention_mask=torch.ones(shape, dtype=torch.long), labels=torch.zeros(shape[0], dtype=torch.long))
    assert training.step_peak(made, batch) / adapters.training_bytes(g, *shape, placement, 16) == pytest.approx(1, abs=.06)
