"""What a reader need not see of distillation: the teacher's table, texts, where a student begins, the plan, shares, and the exercises' usual slips."""
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings as hypothesis_settings, strategies as st
from llmlab.distillation import exercises, logits, result
from llmlab.kit import compression, models, stats, store, teaching, training
from llmlab.kit.settings import UsageError, settings

def refused(text, call, *args, **more):
    with pytest.raises(UsageError, match=text): call(*args, **more)

@pytest.fixture(scope="module")
def teacher(): return models.load("random:bert-tiny", task="classifier", n_labels=3)

@pytest.fixture
def student(): return models.cut_layers(models.load("random:bert-tiny", task="classifier", n_labels=3, seed=1), 1)

@pytest.fixture(scope="module")
def rows():
    words = ("alpha beta", "gamma delta epsilon", "zeta")
    return Dataset.from_dict(dict(text=[words[i % 3] + f" {i}" for i in range(12)], label=[i % 3 for i in range(12)]),
        features=Features(dict(text=Value("string"), label=ClassLabel(names=["a", "b", "c"]))))

# The teacher's table

def test_a_table_answers_by_text_whatever_the_order_and_the_padding(teacher, rows):
    says = torch.arange(36.).view(12, 3)
    ask = logits.told(rows["text"], says, teacher.tokenizer)
    x = teacher.tokenizer(rows["text"][:][::-1], return_tensors="pt", padding=True)
    torch.testing.assert_close(ask(x["input_ids"], x["attention_mask"]), says.flip(0))
    wider = F.pad(x["input_ids"], (0, 3)), F.pad(x["attention_mask"], (0, 3))
    torch.testing.assert_close(ask(*wider), says.flip(0))

def test_a_table_refuses_what_it_has_not(teacher, rows):
    refused("do not go together", logits.told, rows["text"], torch.zeros(3, 3), teacher.tokenizer)
    ask = logits.told(rows["text"], torch.zeros(12, 3), teacher.tokenizer)
    x = teacher.tokenizer(["never seen before"], return_tensors="pt")
    refused("was not asked about", ask, x["input_ids"], x["attention_mask"])

def test_training_from_the_table_is_training_from_the_teacher(teacher, rows):
    x = training.tokenized(rows, teacher.tokenizer)
    with torch.no_grad(): says = torch.cat([teacher.model(**teacher.tokenizer(t, return_tensors="pt")).logits for t in rows["text"]])
    made = []
    for ask in (logits.told(rows["text"], says, teacher.tokenizer), teaching.answering(teacher)):
        m = models.cut_layers(models.load("random:bert-tiny", task="classifier", n_labels=3, seed=1), 1)
        made.append(teaching.retrained(m, x, x, ask, steps=2, batch_size=4, precision="float32", seed=3)[0].model.state_dict())
    for a, b in zip(*(o.values() for o in made)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

def test_a_teacher_of_other_classes_or_tokens_is_refused(teacher, student):
    assert logits.asked(teacher, student)
    refused("same classes", logits.asked, models.load("random:bert-tiny", task="classifier", n_labels=4), student)
    other = replace(teacher, tokenizer=models.load("random:llama-tiny", task="causal-lm").tokenizer)
    refused("different tokenizers.*told", logits.asked, other, student)

def test_a_temperature_of_nothing_is_refused():
    refused("temperature", logits.gradient_norms, torch.zeros(2, 3), torch.zeros(2, 3), (0.,))

# Texts

@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 9))
def test_masking_covers_a_share_and_nothing_else(words, share, seed):
    text = " ".join(words)
    got = logits.masked(text, share, seed=seed).split()
    assert len(got) == len(words) and all(a in (b, "[MASK]") for a, b in zip(got, words))
    assert got.count("[MASK]") == max(1, round(share * len(words)))
    assert logits.masked(text, share, seed=seed).split() == got

@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99))
def test_answers_tell_between_nothing_and_which_class(classes, seed):
    x = torch.randn(40, classes, generator=torch.Generator().manual_seed(seed)) * 4
    told = logits.told_nats(x)
    assert -1e-5 <= told <= torch.tensor(float(classes)).log() + 1e-5
    assert logits.told_nats(x, 4.) <= told + 1e-5
    assert abs(logits.told_nats(x[:1].expand(5, -1))) < 1e-5

# Gradients

def test_without_the_square_the_gradient_falls_with_it():
    x, y = (torch.randn(16, 5, generator=torch.Generator().manual_seed(i)) * 2 for i in (0, 1))
    norms = logits.gradient_norms(x, y, (32., 64.))
    assert norms[32.][0] / norms[64.][0] == pytest.approx(4, rel=.1) and norms[32.][1] == pytest.approx(norms[64.][1], rel=.05)

# Gains and shares

def test_a_gain_is_over_seeds_and_texts():
    a, b = [[1., 1, 0, 1]] * 3, [[1., 0, 0, 0]]
    g = logits.gain(a, b)
    assert g.value == 50 and g.unit == "points" and g.n == 12 and g.low < 50 < g.high
    assert logits.gain(a, a).value == 0
    assert result.kept_share([[1., 1, 1, 0]], [1., 1, 0, 0]).value == pytest.approx(150)
    refused("never right|none of these", result.kept_share, [[1., 0]], [0., 0])

def test_the_interval_over_both_is_wider_than_over_either():
    import numpy as np
    draw = np.random.default_rng(0)
    x = draw.normal(0, 1, (6, 1)) + draw.normal(0, 1, (1, 200)) + draw.normal(0, 1, (6, 200))
    both, items, seeds = stats.crossed(x), stats.estimate(x.mean(0)), stats.estimate(x.mean(1))
    assert both.high - both.low > .9 * max(items.high - items.low, seeds.high - seeds.low)
    assert both.value == pytest.approx(x.mean()) and stats.crossed(x[:1]).n == 200

def test_the_interval_covers_as_often_as_it_says():
    import numpy as np
    draw, hits = np.random.default_rng(1), 0
    for i in range(60):
        x = draw.normal(0, .5, (8, 1)) + draw.normal(0, 1, (1, 60)) + draw.normal(0, 1, (8, 60))
        e = stats.crossed(x, resamples=300, seed=i)
        hits += e.low <= 0 <= e.high
    assert hits >= 50

def test_rows_that_do_not_match_are_refused():
    refused("same examples", stats.crossed, [[1., 2.]], over=[[1., 2., 3.]])
    refused("empty", stats.crossed, [])
    refused("add up to 0", stats.crossed, [[1., 2.]], over=[[0., 0.]])
    assert stats.crossed([[2., 2.], [4., 4.]], over=[[1., 2.]]).value == pytest.approx(2)

# Where a student begins

def test_layers_left_out_by_cost(student, rows):
    whole = models.load("random:bert-tiny", task="classifier", n_labels=3)
    batches = compression.labelled_batches(whole, rows, 8, 4)
    n, kept = len(models.layers_of(whole)), compression.greedy_layers(whole, 1, batches)
    assert len(kept) == 1 and compression.greedy_layers(whole, n, batches) == list(range(n))
    assert not any(m._forward_hooks for m in whole.model.modules())
    refused("at least one stays", compression.greedy_layers, whole, 0, batches)
    refused("empty", compression.greedy_layers, whole, 1, [])
    refused("teacher or base", logits.begun, {}, 1, "nowhere", "spread", rows)

def test_depths_are_counted_as_they_are():
    whole = models.load("random:bert-tiny", task="classifier", n_labels=3)
    found = result.by_depth(whole.model.config)
    for n, o in found.items(): assert models.cut_layers(whole, n).n_parameters == o["parameters"]
    assert found[len(models.layers_of(whole))]["speed_up"] == 1 and list(found.values())[-1]["speed_up"] > 1

@pytest.mark.parametrize("profile", ["smoke", "tiny", "thorough"])
def test_the_plans_can_be_asked_of_the_store(profile):
    s = settings(profile)
    keys = {part: {store.key(r, **a) for r, a in part.recipes(s)} for part in (logits, result)}
    assert len(keys[logits] & keys[result]) >= 4, "the last notebook finds what the first one made"
    lessons = {name: o for (name, _), o in logits.plan(s).items()}
    with_text = lessons.pop("taught with more text")
    control = {k: v for k, v in with_text.items() if k not in ("more", "unlabelled")}
    if lessons: assert control in lessons.values(), "a control learns for as long without the text"
    assert len({o["steps"] for name, o in lessons.items() if name != "taught for longer"}) <= 1, "equal steps for all others"

# What learners often write

def soft(x, y, t, reduction="batchmean"):
    each = F.kl_div((x / t).log_softmax(-1), (y / t).softmax(-1), reduction="none")
    return dict(batchmean=lambda: each.sum() / len(x), mean=each.mean, sum=each.sum, none=lambda: each)[reduction]()

@pytest.mark.parametrize("check,wrong,says", [
    ("soft_loss", lambda x, y, t: soft(x, y, t), "T² is missing"),
    ("soft_loss", lambda x, y, t: t**2 * soft(y, x, t), "other way round"),
    ("soft_loss", lambda x, y, t: t**2 * soft(x, y, t, "mean"), "classes too"),
    ("soft_loss", lambda x, y, t: t**2 * soft(x, y, t, "sum"), "sum over"),
    ("token_loss", lambda x, y, m: soft(x, y, 1.), "batchmean"),
    ("token_loss", lambda x, y, m: soft(x, y, 1., "none").sum(-1).mean(), "padding is in"),
    ("token_loss", lambda x, y, m: (soft(x, y, 1., "none").sum(-1) * m).mean(), "still counted"),
    ("mix", lambda x, y, lab, h, t: h * F.cross_entropy(x[lab >= 0], lab[lab >= 0]) + (1 - h) * t**2 * soft(x, y, t), "no text at all"),
    ("mix", lambda x, y, lab, h, t: t**2 * soft(x, y, t) * (1 if (lab < 0).all() else 1 - h) + h * F.cross_entropy(x, lab, ignore_index=-1, reduction="sum")
        / len(lab), "over the labelled texts"),
    ("layer_map", lambda t, n: list(range(n)), "the last learns from the last"),
    ("layer_map", lambda t, n: [round((i + 1) * t / n) - 1 for i in range(n)], "rounds another way"),
    ("seeds_needed", lambda sd, e: 5, "seeds"),
])
def test_usual_slips_are_named(check, wrong, says):
    with pytest.raises(AssertionError, match=says): getattr(exercises, f"check_{check}")(wrong)

def test_slips_of_two_functions_are_named():
    def shrink(x, k): return tuple(x.topk(k, -1))
    def grow(kept, at, v): return torch.zeros(len(kept), v).scatter(1, at, kept.exp())
    with pytest.raises(AssertionError, match="log-probabilities"): exercises.check_cache(shrink, grow)
    with pytest.raises(AssertionError, match="adds up"): exercises.check_cache(lambda x, k: tuple(x.log_softmax(-1).topk(k, -1)), grow)
    def naive(p, q): return (p * (p / q).log()).sum()
    with pytest.raises(AssertionError, match="not a number"): exercises.check_divergences(naive, lambda p, q: naive(q, p))
