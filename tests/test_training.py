"""Training: windows, resuming, and what happens when something goes wrong. The models are small and random."""
import errno
import math

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from transformers import TrainerCallback

from llmlab.kit import models, training
from llmlab.kit.settings import Unavailable, UsageError
from llmlab.kit.training import Diverged, checkpoints, fit, pack, tokenized

TEXT = ["def add(a, b): return a + b", "The sum of two numbers.", "Raises ValueError for what is no number."] * 60


class Cut(Exception): pass


class CutAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step: raise Cut


@pytest.fixture(scope="module")
def lm():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=300,
        max_position_embeddings=64, tie_word_embeddings=True)
    tokenizer = models.random_tokenizer(config)
    torch.manual_seed(0)
    return models.Loaded(LlamaForCausalLM(config).eval(), tokenizer, "test-llama", "random", "causal-lm")


@pytest.fixture(scope="module")
def stream(lm): return pack(TEXT, lm.tokenizer, 32)


@pytest.fixture(scope="module")
def classifier():
    return models.load("random:bert-tiny", "classifier", n_labels=2)


def rows(classifier, n=24):
    from datasets import Dataset
    texts = [("an array of numbers " * (1 + i % 5)) if i % 2 else ("a name, " * (1 + i % 7)) for i in range(n)]
    return tokenized(Dataset.from_dict(dict(text=texts, label=[i % 2 for i in range(n)])), classifier.tokenizer, 64)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.loaded.model.parameters(), b.loaded.model.parameters()))


@given(st.lists(st.text(alphabet="ab c", max_size=30), min_size=1, max_size=12), st.integers(2, 9))
@hypothesis_settings(max_examples=40, deadline=None)
def test_windows_hold_the_texts_in_order_and_nothing_else(lm, texts, length):
    tok = lm.tokenizer
    whole = [i for t in texts for i in [tok.bos_token_id, *tok(t, add_special_tokens=False)["input_ids"], tok.eos_token_id]]
    if len(whole) < length:
        with pytest.raises(UsageError, match="fewer than one window"): pack(texts, tok, length)
        return
    found = pack(texts, tok, length)
    assert found.shape[1] == length and found.flatten().tolist() == whole[:len(whole) // length * length] and len(whole) - found.numel() < length


test_windows_hold_the_texts_in_order_and_nothing_else = pytest.mark.filterwarnings("ignore")(test_windows_hold_the_texts_in_order_and_nothing_else)


@pytest.mark.parametrize("optimizer, precision", [("adamw", "float32"), ("muon", "bfloat16")])
def test_a_training_that_was_cut_off_ends_as_one_that_was_not(lm, stream, tmp_path, optimizer, precision):
    how = dict(steps=9, batch_size=4, lr=.003, optimizer=optimizer, precision=precision, schedule="wsd")
    whole = fit(lm, stream, stream[:8], eval_every=4, save_every=4, folder=tmp_path/"whole", **how)
    with pytest.raises(Cut): fit(lm, stream, stream[:8], eval_every=4, save_every=4, folder=tmp_path/"cut", callbacks=[CutAt(6)], **how)
    assert [p.name for p in checkpoints(tmp_path/"cut")] == ["checkpoint-4"]
    resumed = fit(lm, stream, stream[:8], eval_every=4, save_every=4, folder=tmp_path/"cut", **how)
    assert same(whole, resumed) and resumed.steps == 9 and len(resumed.step_seconds) == 5
    assert [r["step"] for r in whole.curve] == [r["step"] for r in resumed.curve] and whole.of("loss") == resumed.of("loss")
    done = fit(lm, stream, stream[:8], eval_every=4, save_every=4, folder=tmp_path/"whole", **how)  # complete: nothing is trained
    assert same(whole, done) and not done.step_seconds and done.steps == 9 and done.of("loss") == whole.of("loss")


def test_with_dropout_and_length_groups_too(classifier, tmp_path):
    data, how = rows(classifier), dict(steps=8, batch_size=4, lr=.001, group_by_length=True, save_every=3)
    assert classifier.model.config.hidden_dropout_prob > 0
    whole = fit(classifier, data, folder=tmp_path/"a", **how)
    with pytest.raises(Cut): fit(classifier, data, folder=tmp_path/"b", callbacks=[CutAt(5)], **how)
    assert same(whole, fit(classifier, data, folder=tmp_path/"b", **how))


def test_a_half_written_checkpoint_does_not_count(lm, stream, tmp_path):
    how = dict(steps=6, batch_size=4, lr=.003, save_every=2, folder=tmp_path)
    with pytest.raises(Cut): fit(lm, stream, callbacks=[CutAt(5)], **how)
    (checkpoints(tmp_path)[-1]/"complete").unlink()  # as if the process had died while it wrote the last
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    resumed = fit(lm, stream, **how)
    assert len(resumed.step_seconds) == 4 and same(resumed, fit(lm, stream, **how | dict(folder=tmp_path/"other")))


def test_a_full_disk_leaves_the_checkpoint_before(lm, stream, tmp_path, monkeypatch):
    from transformers import Trainer
    write = Trainer._save_optimizer_and_scheduler
    def full(self, folder):
        if self.state.global_step >= 4: raise OSError(errno.ENOSPC, "No space left on device")
        write(self, folder)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(Unavailable, match="step 4.*No space left.*goes on from checkpoint-2"):
        fit(lm, stream, steps=6, batch_size=4, save_every=2, folder=tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(fit(lm, stream, steps=6, batch_size=4, save_every=2, folder=tmp_path).step_seconds) == 4


def test_checkpoints_rotate_and_the_best_stays(lm, stream, tmp_path):
    fit(lm, stream, steps=10, batch_size=4, save_every=2, keep=2, folder=tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-10"]
    found = fit(lm, stream[:4], stream[20:40], steps=80, batch_size=4, lr=.03, optimizer="muon", schedule="constant", warmup=0,
        eval_every=4, patience=3, keep=1, folder=tmp_path/"early")
    losses = dict(found.of("eval_loss"))
    assert found.steps < 80 and losses[found.best_step] == min(losses.values())
    again = training.fit(found.loaded, stream[:4], stream[20:40], steps=1, batch_size=4, lr=1e-9, eval_every=1).of("eval_loss")[0][1]
    assert math.isclose(again, min(losses.values()), rel_tol=1e-4)  # what is returned is the best, not the last


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_last_good_checkpoint(lm, stream, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **more):
            if state.global_step == 5: model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"nan at step 6.*checkpoint-4"):
        fit(lm, stream, steps=9, batch_size=4, save_every=2, folder=tmp_path, callbacks=[Poison()])
    assert checkpoints(tmp_path)[-1].name == "checkpoint-4"
    assert all(torch.isfinite(p).all() for p in models.load(str(checkpoints(tmp_path)[-1]), "causal-lm").model.parameters())


def test_a_loss_that_climbs_is_stopped():
    watch = training._Watch(span=5)
    assert not any(watch.wrong(2 + .1 * (i % 3)) for i in range(50))
    assert any(watch.wrong(2 + i) for i in range(20))


def test_accumulated_batches_are_one_batch(lm, stream):
    a = fit(lm, stream, steps=3, batch_size=8, lr=.001)
    b = fit(lm, stream, steps=3, batch_size=4, accumulate=2, lr=.001)
    assert a.tokens == b.tokens == 3 * 8 * 32
    for x, y in zip(a.loaded.model.parameters(), b.loaded.model.parameters()): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_the_model_given_stays_as_it_is_unless_asked(lm, stream):
    before = [p.clone() for p in lm.model.parameters()]
    done = fit(lm, stream, steps=2, batch_size=2, lr=.01)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters())) and done.loaded.weights == "trained" and not done.loaded.model.training
    mine = models.Loaded(torch.nn.Module.__new__(type(lm.model)), lm.tokenizer, "copy", "random", "causal-lm")
    mine.model.__dict__ = __import__("copy").deepcopy(lm.model).__dict__
    assert fit(mine, stream, steps=1, batch_size=2, in_place=True).loaded.model is mine.model


def test_tied_weights_stay_tied(lm, stream):
    model = fit(lm, stream, steps=2, batch_size=2, optimizer="muon").loaded.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_decay_spares_norms_and_biases(classifier):
    matrices, spared = training.decayed(classifier.model)
    assert {p.ndim for p in matrices} == {2} and {p.ndim for p in spared} == {1}
    assert sum(p.numel() for p in (*matrices, *spared)) == classifier.n_parameters


def test_muon_takes_each_parameter_once_and_its_state_comes_back(lm):
    a = training.MuonAdamW(lm.model)
    ids = [id(p) for g in a.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in lm.model.parameters())
    with pytest.raises(UsageError, match="no matrices"): training.MuonAdamW(torch.nn.LayerNorm(4))


def test_a_classifier_learns_with_every_padding(classifier):
    data = rows(classifier)
    found = {}
    for name, how in dict(longest={}, grouped=dict(group_by_length=True), max=dict(padding="max", max_tokens=64)).items():
        done = fit(classifier, data, data, epochs=8, batch_size=8, lr=2e-3, **how)
        found[name] = done.of("eval_accuracy")[-1][1]
        assert done.tokens == 8 * sum(data["length"][:])  # padding is not counted
    assert min(found.values()) >= .95, found


def test_tensorboard_events_are_written(lm, stream, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fit(lm, stream, stream[:4], steps=4, batch_size=2, eval_every=2, log_every=1, tensorboard=True, folder=tmp_path)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert {"train/loss", "eval/loss"} <= set(events.Tags()["scalars"]) and len(events.Scalars("train/loss")) == 4


@pytest.mark.parametrize("how, said", [
    (dict(), "either steps or epochs"), (dict(steps=1, epochs=1), "either steps or epochs"), (dict(steps=0), "steps=0 is out of range"),
    (dict(steps=1, lr=-1.), "lr=-1.0 is out of range"), (dict(steps=1, optimizer="adam"), "Did you mean adamw"),
    (dict(steps=1, schedule="step"), "unknown schedule"),
    (dict(steps=1, precision="int8"), "unknown precision"), (dict(steps=1, padding="min"), "unknown padding"),
    (dict(steps=1, patience=2), "needs validation data"),
    (dict(steps=4, patience=2, eval_every=2, save_every=3), "multiple of eval_every"),
    (dict(steps=1, validation=torch.zeros(0, 32, dtype=torch.int32)), "validation is empty"),
])
def test_what_cannot_be_trained_is_refused(lm, stream, how, said):
    how = dict(how)
    validation = how.pop("validation", stream[:4] if "save_every" in how else None)
    with pytest.raises(UsageError, match=said): fit(lm, stream, validation, **how)


def test_a_tokenizer_or_data_that_do_not_fit_are_refused(lm, stream, classifier):
    from dataclasses import replace
    with pytest.raises(UsageError, match="tokenizer does not fit.*30,522.*300"): fit(replace(lm, tokenizer=classifier.tokenizer), stream, steps=1)
    with pytest.raises(UsageError, match="token 1298 is none of the 300"): fit(lm, stream + 1000 - stream.max() + 298, steps=1)
    with pytest.raises(UsageError, match="over the context of test-llama, 64"): fit(lm, pack(TEXT, lm.tokenizer, 128), steps=1)
    with pytest.raises(UsageError, match="was loaded as classifier"): fit(classifier, stream, steps=1)
    with pytest.raises(UsageError, match="nothing to train on"): fit(lm, stream[:0], steps=1)
    data = rows(classifier)
    with pytest.raises(UsageError, match="label 2 is out of range.*0 … 1"): fit(classifier, data.map(lambda r: dict(labels=r["labels"] * 2)), steps=1)
    with pytest.raises(UsageError, match="one class"): fit(classifier, data.select(range(0, 24, 2)), steps=1)
    with pytest.raises(UsageError, match="no column 'text'"): tokenized(data, classifier.tokenizer)
