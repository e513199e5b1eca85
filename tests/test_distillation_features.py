"""What a reader need not see of learning from a teacher's inside: other families, bad input, gradients, invariances."""
import itertools
import pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings as hypothesis_settings, strategies as st
from llmlab.distillation import features, logits, relations
from llmlab.kit import models, teaching, training
from llmlab.kit.settings import UsageError, settings

def refused(text, call, *args, **more):
    with pytest.raises(UsageError, match=text): call(*args, **more)

def tiny(name="random:bert-tiny", seed=0, task="classifier"):
    return models.load(name, task=task, seed=seed, n_labels=3 if task == "classifier" else None)

@pytest.fixture(scope="module")
def bert(): return tiny()

@pytest.fixture(scope="module")
def distilbert(bert):
    from transformers import AutoModelForSequenceClassification, DistilBertConfig
    config = DistilBertConfig(vocab_size=bert.model.config.vocab_size, dim=32, hidden_dim=64, n_heads=4, n_layers=4, num_labels=3, attn_implementation="sdpa")
    return replace(bert, model=AutoModelForSequenceClassification.from_config(config).eval(), name="a small DistilBERT")

@pytest.fixture(scope="module")
def llama(): return tiny("random:llama-tiny", task="causal-lm")

@pytest.fixture(scope="module")
def rows():
    words = ("alpha beta", "gamma delta epsilon", "zeta")
    return Dataset.from_dict(dict(text=[words[i % 3] + f" {i}" for i in range(24)], label=[i % 3 for i in range(24)]),
        features=Features(dict(text=Value("string"), label=ClassLabel(names=["a", "b", "c"]))))

# Layer maps

@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from(features.LAYER_MAPS))
def test_every_map_ascends_within_the_teacher(k, more, how):
    found = features.layer_map(k, k + more, how)
    assert len(found) == k and list(found) == sorted(set(found)) and 0 <= found[0] and found[-1] < k + more
    if how != "first": assert found[-1] == k + more - 1
    assert features.layer_map(k, k + more, list(found)) == found

@pytest.mark.parametrize("how, text", [([0, 1], "3 layers: one for each"), ([1, 3, 6], "names layer 6"), ([-1, 2, 3], "names layer -1"),
    ([1, 3, 2], "must ascend"), ([1, 1, 2], "must ascend"), ([None] * 3, "no layer at all"),
    ("every second", "layer map"), ([0, 1, True], "names layer True"), ([0., 1, 2], "names layer 0.0")])
def test_a_map_that_does_not_fit_is_refused(how, text): refused(text, features.layer_map, 3, 6, how)

def test_more_layers_than_the_teacher_are_refused():
    refused("cannot learn", features.layer_map, 7, 6)
    refused("cannot learn", features.layer_map, 0, 6)

# Losses

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from(("mse", "cosine")), st.integers(1, 4), st.integers(0, 3))
def test_padding_does_not_count(seed, how, real, pad):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, real, 5, generator=g), torch.randn(2, real, 5, generator=g)
    mask = torch.tensor([[1] * real + [0] * pad] * 2)
    wide = [torch.cat([o, 9 * torch.randn(2, pad, 5, generator=g)], 1) for o in (x, y)]
    torch.testing.assert_close(features.hidden_loss(*wide, mask, how), features.hidden_loss(x, y, None, how))
    maps = [torch.randn(2, 3, real + pad, real + pad, generator=g).masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1) for _ in range(2)]
    torch.testing.assert_close(features.attention_loss(*maps, mask), features.attention_loss(*(o[..., :real, :real] for o in maps)), rtol=1e-4, atol=1e-6)

def test_losses_are_zero_for_a_copy_and_one_for_silence():
    x, a = torch.randn(2, 3, 5), torch.randn(2, 4, 3, 3).softmax(-1)
    assert features.hidden_loss(x, x) == 0 and features.hidden_loss(x, x, how="cosine") < 1e-6 and features.attention_loss(a, a).abs() < 1e-6
    torch.testing.assert_close(features.hidden_loss(torch.zeros_like(x), x), torch.tensor(1.))
    torch.testing.assert_close(features.hidden_loss(5 * x, 5 * (x + 1)), features.hidden_loss(x, x + 1))

def test_maps_of_a_causal_model_have_zeros_and_a_finite_loss():
    a, b = (torch.randn(1, 2, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), -1e9).softmax(-1) for _ in range(2))
    a.requires_grad_()
    features.attention_loss(a, b).backward()
    assert a.grad.isfinite().all()

def test_what_does_not_fit_is_refused(bert):
    x, a = torch.randn(2, 3, 5), torch.randn(2, 4, 3, 3).softmax(-1)
    refused("projection", features.hidden_loss, x, torch.randn(2, 3, 7))
    refused("loss of hidden states", features.hidden_loss, x, x, None, "kl")
    refused("heads='mean'", features.attention_loss, a[:, :2], a)
    assert features.attention_loss(a[:, :2], a, heads="mean").isfinite()
    refused("treatment", features.attention_loss, a, a, None, "all")
    refused("at least 1", features.projections, 0, 4, 1)
    refused("width", features.least_error, x[0], 0)
    refused("multiple", features.narrowed, bert, 1, 65)
    refused("layers=9", features.narrowed, bert, 9, 64)
    refused("start", features.started, bert, [0], "middle")
    refused("base", features.started, bert, [0], "base")

def test_projections_are_the_same_for_a_seed_and_nothing_between_equal_widths():
    a, b = features.projections(3, 5, 2, seed=1), features.projections(3, 5, 2, seed=1)
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(a, b)) and not torch.equal(a[0].weight, a[1].weight)
    assert not list(features.projections(5, 5, 2).parameters())

@hypothesis_settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(0, 50))
def test_no_projection_does_better_than_the_least_error(width, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=g) * torch.tensor([5., 3, 2, 1, .5, .1])
    basis = torch.linalg.svd(x)[2][:width]
    best = (x - x @ basis.t() @ basis).square().sum() / x.square().sum()
    assert features.least_error(x, width) == pytest.approx(best.item(), abs=1e-5)
    other = torch.linalg.qr(torch.randn(6, width, generator=g))[0]
    assert features.least_error(x, width) <= ((x - x @ other @ other.t()).square().sum() / x.square().sum()).item() + 1e-6

# Families

@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("kind", ["hidden", "attention", "distances", "contrast"])
def test_lessons_train_students_of_every_family(family, kind, request, rows):
    teacher = request.getfixturevalue(family)
    student = models.cut_layers(teacher, 1)
    made = dict(hidden=features.hidden_lesson, attention=features.attention_lesson).get(kind) or (lambda a, b: relations.relation_lesson(a, b, kind))
    x = torch.randint(5, 250, (8, 12), dtype=torch.int32) if teacher.task == "causal-lm" else training.tokenized(rows, teacher.tokenizer)
    was, theirs = ({k: v.clone() for k, v in m.model.state_dict().items()} for m in (student, teacher))
    with features.imitating(student, teacher, made(student, teacher)):
        student, _ = teaching.retrained(student, x, x[:4] if torch.is_tensor(x) else x, steps=2, batch_size=4, lr=1e-2)
    now = student.model.state_dict()
    assert list(now) == list(was) and all(v.isfinite().all() for v in now.values()) and any(not torch.equal(v, was[k]) for k, v in now.items())
    assert all(torch.equal(v, theirs[k]) for k, v in teacher.model.state_dict().items())
    assert student.model.config._attn_implementation == teacher.model.config._attn_implementation == "sdpa"

@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_a_narrow_student_of_every_family_learns_through_a_projection(family, request):
    teacher = request.getfixturevalue(family)
    old = teacher.model.config
    width = old.hidden_size // 2
    thin = features.narrowed(teacher, 1, width)
    assert thin.model.config.hidden_size == width and len(models.layers_of(thin)) == 1 and old.hidden_size == 2 * width
    x = torch.randint(5, 250, (4, 9))
    lesson, mask = features.hidden_lesson(thin, teacher), torch.ones_like(x)
    with torch.no_grad(): theirs = teacher.model(input_ids=x, **lesson.wants)
    losses, optimizer = [], torch.optim.AdamW([*thin.model.parameters(), *lesson.beside.parameters()], 1e-2)
    for _ in range(12):
        losses.append(lesson.loss(thin.model(input_ids=x, **lesson.wants), theirs, mask))
        optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    assert losses[-1] < .8 * losses[0]
    refused("heads", features.attention_lesson, thin, teacher)
    assert features.attention_lesson(thin, teacher, heads="mean").maps

@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_eager_forms_maps_without_dropout_and_leaves_no_trace(family, request):
    m = request.getfixturevalue(family)
    x = torch.randint(5, 250, (2, 7))
    rates = lambda: [o.p for o in m.model.modules() if isinstance(o, torch.nn.Dropout)] + [getattr(o, "attention_dropout", None) for o in m.model.modules()]
    was = rates()
    with pytest.raises(KeyError), features.eager(m):
        with torch.no_grad(): maps = m.model.train()(input_ids=x, output_attentions=True).attentions
        assert len(maps) == m.model.config.num_hidden_layers
        torch.testing.assert_close(maps[0].sum(-1), torch.ones_like(maps[0].sum(-1)))
        raise KeyError
    m.model.eval()
    assert rates() == was and m.model.config._attn_implementation == "sdpa"

@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_counted_bytes_are_the_returned_ones(family, request):
    m = request.getfixturevalue(family)
    x = torch.randint(5, 250, (3, 11))
    with torch.no_grad(), features.eager(m): out = m.model(input_ids=x, output_attentions=True, output_hidden_states=True)
    found = features.inside_bytes(models.geometry(m), 3, 11)
    assert found == dict(hidden=sum(o.nbytes for o in out.hidden_states), attention=sum(o.nbytes for o in out.attentions))

def test_other_tokens_are_refused(bert, llama):
    other = replace(bert, name="another")
    assert features.same_tokens(bert, other) is None
    object.__setattr__(other, "tokenizer", llama.tokenizer)
    with pytest.raises(UsageError, match="different tokenizers"), features.imitating(bert, other, features.hidden_lesson(bert, bert)): pass
    with pytest.raises(UsageError, match="weight=0"), features.imitating(bert, bert, features.hidden_lesson(bert, bert), weight=0): pass

def test_students_begin_as_they_are_told(bert):
    base = tiny(seed=5)
    inner = lambda m: models.layers_of(m)[0].state_dict()
    same = lambda a, b: all(torch.equal(v, b[k]) for k, v in a.items())
    assert same(inner(features.started(bert, [1])), models.layers_of(bert)[1].state_dict())
    assert same(inner(features.started(bert, [1], "base", base)), models.layers_of(base)[1].state_dict())
    fresh, again = (features.started(bert, [1], "nothing", seed=3) for _ in range(2))
    assert fresh.weights == "random" and same(inner(fresh), inner(again)) and not same(inner(fresh), models.layers_of(bert)[1].state_dict())
    assert features.started(bert, [1], "narrow").model.config.hidden_size == bert.model.config.hidden_size // 2

# Gains

def test_a_gain_is_paired_over_seeds_and_examples():
    g = torch.Generator().manual_seed(0)
    b = torch.randint(0, 2, (5, 200), generator=g)
    a = torch.where(torch.rand(5, 200, generator=g) < .1, 1, b)
    found = logits.gain(a.tolist(), b.tolist())
    assert found.value == pytest.approx(100 * (a - b).float().mean().item()) and 0 < found.low < found.value < found.high
    assert logits.gain(b.tolist(), b.tolist()).value == logits.gain(b.tolist(), b.tolist()).high == 0
    one = features.accuracy_of(b[:1].tolist())
    assert one.low < one.value < one.high and one.unit == "%"
    refused("paired", logits.gain, a.tolist(), b[:3].tolist())

def test_seeds_that_differ_widen_the_interval():
    alike, apart = [[1, 0] * 50] * 4, [[1] * 100, [0] * 100] * 2
    width = lambda e: e.high - e.low
    assert width(features.accuracy_of(apart)) > 2 * width(features.accuracy_of(alike))

# Relations

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(3, 6), st.integers(1, 5))
def test_relations_are_those_of_the_library(seed, n, d):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g), torch.randn(n, d + 1, generator=g)
    torch.testing.assert_close(relations.distances(x), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), rtol=1e-4, atol=1e-5)
    triples = list(itertools.permutations(range(n), 3))
    cosines = [torch.stack([F.cosine_similarity(o[i] - o[j], o[k] - o[j], dim=0) for i, j, k in triples]) for o in (x, y)]
    torch.testing.assert_close(relations.angle_loss(x, y), F.smooth_l1_loss(*cosines), rtol=1e-3, atol=1e-5)
    off = [torch.pdist(o) / torch.pdist(o).mean() for o in (x, y)]
    torch.testing.assert_close(relations.distance_loss(x, y), F.smooth_l1_loss(*off), rtol=1e-3, atol=1e-5)

def test_gradients_are_right_and_finite_where_texts_coincide():
    x = torch.randn(4, 3, dtype=torch.float64).float()
    y = torch.randn(4, 5)
    for loss in (relations.distance_loss, relations.angle_loss):
        a = x.clone().requires_grad_()
        loss(a, y).backward()
        step = torch.randn_like(x)
        slope = (loss(x + 1e-3 * step, y) - loss(x - 1e-3 * step, y)) / 2e-3
        assert (a.grad * step).sum().item() == pytest.approx(slope.item(), rel=.05, abs=1e-3)
        same = torch.ones(4, 3, requires_grad=True)
        loss(same, y).backward()
        assert same.grad.isfinite().all()
        loss(x, torch.ones(4, 5))

def test_bfloat16_around_it_does_not_blur_near_vectors():
    x = 100 + torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(relations.distances(x), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), rtol=1e-4, atol=1e-4)
        inside = relations.angles(x), relations.contrastive_loss(x, x)
    torch.testing.assert_close(inside[0], relations.angles(x)); torch.testing.assert_close(inside[1], relations.contrastive_loss(x, x))

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.floats(.05, 2.))
def test_contrast_is_a_classification_of_the_batch(n, t):
    x, y = torch.randn(n, 6), torch.randn(n, 6)
    near = F.cosine_similarity(x[:, None], y[None], dim=-1) / t
    torch.testing.assert_close(relations.contrastive_loss(x, y, t), -near.log_softmax(-1).diagonal().mean(), rtol=1e-3, atol=1e-5)

def test_relations_that_cannot_be_are_refused(bert):
    one, two, x = torch.randn(1, 4), torch.randn(2, 4), torch.randn(3, 4)
    for loss in (relations.distance_loss, relations.contrastive_loss): refused("need 2 texts", loss, one, one)
    refused("need 3 texts", relations.angle_loss, two, two)
    refused("same texts", relations.distance_loss, two, x)
    refused("one width", relations.contrastive_loss, x, torch.randn(3, 5))
    for t in (0, -1.): refused("temperature", relations.contrastive_loss, x, x, t)
    refused("temperature", relations.relation_lesson, bert, bert, "contrast", 0)
    refused("relation", relations.relation_lesson, bert, bert, "order")

def test_the_mean_state_leaves_padding_out():
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(relations.pooled(x, mask), torch.stack([x[0, :2].mean(0), x[1].mean(0)]))
    torch.testing.assert_close(relations.pooled(x), x.mean(1))

# Plans

@pytest.mark.parametrize("profile", ["smoke", "tiny", "thorough"])
def test_plans_name_each_training_once_and_share_the_controls(profile):
    import json
    s = settings(profile, device="cpu")
    told = lambda plan: {name: json.dumps([recipe.name, arguments], sort_keys=True) for name, (recipe, arguments) in plan.items()}
    mine, theirs = told(features.plan(s)), told(relations.plan(s))
    assert len({*mine.values()}) == len(mine) and all(mine[name] == o for name, o in theirs.items() if name in mine)
    assert len({i for _, i in mine}) == s.seeds and all((f"{o}, {p}", 0) in mine for o in ("base", "teacher") for p in ("labels", "hidden"))
