"""What a reader need not see of structured pruning: every family, saving and reloading, refusals, properties."""
import copy
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from llmlab.kit import compression
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError
from llmlab.pruning import structured

WIDTH = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=64, max_position_embeddings=32)
CONFIGS = {
    "llama": ("LlamaConfig", WIDTH | dict(tie_word_embeddings=True)),
    "llama-untied": ("LlamaConfig", WIDTH | dict(tie_word_embeddings=False)),
    "mistral": ("MistralConfig", WIDTH | dict(num_key_value_heads=2, sliding_window=None)),
    "qwen2": ("Qwen2Config", WIDTH | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", WIDTH | dict(num_key_value_heads=2, head_dim=16)),
    "mixtral": ("MixtralConfig", WIDTH | dict(num_key_value_heads=2, num_local_experts=2)),
    "opt": ("OPTConfig", dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, vocab_size=64, max_position_embeddings=32,
        word_embed_proj_dim=32)),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)),
    "bert": ("BertConfig", WIDTH),
    "distilbert": ("DistilBertConfig", dict(dim=32, n_layers=3, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=32)),
}
CAUSAL = [n for n in CONFIGS if n not in ("bert", "distilbert")]
FREE = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "mixtral"]  # heads can go alone
DENSE = [n for n in CONFIGS if n != "mixtral"]

def made(name, task=None):
    import transformers
    kind, options = CONFIGS[name]
    config = getattr(transformers, kind)(**options)
    config.pad_token_id = 0
    task = task or ("causal-lm" if name in CAUSAL else "classifier")
    torch.manual_seed(0)
    auto = dict(encoder="AutoModel", classifier="AutoModelForSequenceClassification") | {"causal-lm": "AutoModelForCausalLM"}
    model = getattr(transformers, auto[task]).from_config(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n.lower() or n.endswith("bias"): p.add_(torch.randn_like(p) * .1)  # nothing is 0 or 1 by accident
    return Loaded(model, None, name, "random", task)

def batches(task="causal-lm"):
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (4, 10))
    mask = torch.ones_like(ids); mask[0, 7:] = 0
    more = dict(labels=torch.tensor([0, 1, 1, 0])) if task == "classifier" else {}
    return [dict(input_ids=ids, attention_mask=mask) | more, dict(input_ids=ids.flip(0), attention_mask=mask.flip(0)) | more]

@torch.no_grad()
def out(loaded, b=None):
    b = b or batches()[0]
    return structured._first(loaded.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], return_dict=False))

def reloaded(loaded, folder):
    loaded.model.save_pretrained(folder)
    return type(loaded.model).from_pretrained(folder, output_loading_info=True)

def whole(loaded, before, folder):
    "Saved, reloaded without a word, and equal; the original is as it was."
    again, info = reloaded(loaded, folder)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    b = batches()[0]
    with torch.no_grad(): theirs = structured._first(again.eval()(input_ids=b["input_ids"], attention_mask=b["attention_mask"], return_dict=False))
    torch.testing.assert_close(theirs, out(loaded), rtol=0, atol=0)
    if loaded.task == "causal-lm":
        ids = b["input_ids"][1:2]
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        cached, bare = (loaded.model.generate(ids, use_cache=c, **options) for c in (True, False))
        assert torch.equal(cached, bare)
    assert all(torch.equal(v, loaded_state) for v, loaded_state in zip(before[0].values(), before[1].model.state_dict().values()))

def kept_state(loaded): return {k: v.clone() for k, v in loaded.model.state_dict().items()}, loaded

@pytest.mark.parametrize("name", DENSE)
def test_mlp_cut_equals_closed_gates_and_reloads(name, tmp_path):
    m = made(name)
    before, score = kept_state(m), structured.scores(m, "mlp")
    small, changes = structured.prune_mlp(m, share=.5)
    gates = structured.open_gates(m, "mlp")
    for g, w in zip(gates, score): g.zero_()[structured.kept(w, len(w) // 2)] = 1
    with structured.gated(m, "mlp", gates): torch.testing.assert_close(out(small), out(m), rtol=1e-4, atol=1e-5)
    assert changes.after_bytes < changes.before_bytes == sum(p.nbytes for p in m.model.parameters())
    assert changes.after_bytes == sum(p.nbytes for p in small.model.parameters())
    whole(small, before, tmp_path)

@pytest.mark.parametrize("name", FREE)
def test_heads_cut_equals_closed_gates_and_reloads(name, tmp_path):
    m = made(name)
    before, score = kept_state(m), structured.scores(m, "heads", "activation", batches())
    small, _ = structured.prune_heads(m, keep=2, score="activation", batches=batches())
    shape, gates = structured.shape_of(m.model.config), structured.open_gates(m, "heads")
    for g, w in zip(gates, score): g.zero_()[structured.kept(w, 2, 1 if shape.heads == shape.groups else shape.groups)] = 1
    with structured.gated(m, "heads", gates): torch.testing.assert_close(out(small), out(m), rtol=1e-4, atol=1e-5)
    assert small.model.config.num_attention_heads == 2 and small.model.config.head_dim == shape.head_dim
    whole(small, before, tmp_path)

@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "mixtral"])
def test_whole_groups_shrink_the_cache(name, tmp_path):
    m = made(name)
    before = kept_state(m)
    small, _ = structured.prune_heads(m, keep=1, groups=True)
    assert (small.model.config.num_key_value_heads, small.model.config.num_attention_heads) == (1, 2)
    gates = structured.open_gates(m, "groups")
    for g, w in zip(gates, structured.scores(m, "groups")): g.zero_()[structured.kept(w, 1)] = 1
    with structured.gated(m, "groups", gates): torch.testing.assert_close(out(small), out(m), rtol=1e-4, atol=1e-5)
    whole(small, before, tmp_path)

@pytest.mark.parametrize("name", DENSE)
def test_width_reloads(name, tmp_path):
    m = made(name)
    before = kept_state(m)
    small, changes = structured.prune_hidden(m, keep=16)
    assert small.model.config.hidden_size == 16 and changes.after_bytes == sum(p.nbytes for p in small.model.parameters())
    whole(small, before, tmp_path)

@pytest.mark.parametrize("name", CONFIGS)
def test_layers_reload(name, tmp_path):
    m = made(name)
    before = kept_state(m)
    small, changes = structured.prune_layers(m, keep=2, score="activation", batches=batches())
    gates, score = structured.open_gates(m, "layers"), structured.scores(m, "layers", "activation", batches())
    gates.zero_()[structured.kept(score, 2)] = 1
    with structured.gated(m, "layers", gates): torch.testing.assert_close(out(small), out(m), rtol=1e-4, atol=1e-5)
    assert sum(c.after_bytes == 0 and c.before_bytes > 0 for c in changes) > 0 and changes.after_bytes == sum(p.nbytes for p in small.model.parameters())
    whole(small, before, tmp_path)

@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("what", structured.UNITS)
def test_every_score_of_every_unit(name, what):
    m = made(name)
    for score in structured.SCORES:
        found = structured.scores(m, what, score, batches(m.task))
        found = found if isinstance(found, list) else [found]
        n = structured.count(m, what)
        assert all(f.shape == (n,) and torch.isfinite(f).all() for f in found) and len(found) == (1 if what in ("hidden", "layers") else 3)
        if score not in ("random", "loss"): assert all((f >= 0).all() for f in found)

def test_the_gradient_foretells_what_closing_costs():
    m, b = made("llama"), batches()
    slope, gates = structured.scores(m, "mlp", "gradient", b[:1])[0], structured.open_gates(m, "mlp")
    i = int(slope.argmax())
    gates[0][i] = 0
    with torch.no_grad():
        whole_loss = compression.loss_of(m, b[0])
        with structured.gated(m, "mlp", gates): change = compression.loss_of(m, b[0]) - whole_loss
    assert abs(float(change)) == pytest.approx(float(slope[i]), rel=.1)

def test_greedy_starts_where_leave_one_out_does():
    m, b = made("llama"), batches()
    costs = structured.scores(m, "layers", "loss", b)
    assert int(costs.argmin()) not in compression.greedy_layers(m, 2, b)
    small, _ = structured.prune_layers(m, keep=2, score="greedy", batches=b)
    assert small.model.config.num_hidden_layers == 2

def test_ties_stay_ties():
    for name in ("llama", "gpt2", "opt", "qwen2"):
        m = made(name)
        for cut in (structured.prune_mlp(m, share=.5)[0], structured.prune_hidden(m, keep=16)[0], structured.prune_layers(m, keep=1)[0]):
            assert cut.model.get_input_embeddings().weight is cut.model.get_output_embeddings().weight

def test_nothing_is_shared_with_the_original():
    m = made("llama")
    mine = {p.data_ptr() for p in m.model.parameters()}
    for cut in (structured.prune_mlp(m, keep=8), structured.prune_heads(m, keep=2), structured.prune_hidden(m, keep=16), structured.prune_layers(m, keep=2)):
        assert not mine & {p.data_ptr() for p in cut[0].model.parameters()}

@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 48), seed=st.integers(0, 9))
def test_any_number_of_neurons(n, seed):
    m = made("llama")
    small, _ = structured.prune_mlp(m, keep=n, score="random", seed=seed)
    assert small.model.config.intermediate_size == n and small.model.model.layers[0].mlp.down_proj.weight.shape == (32, n)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_groups_keep_the_same_number(groups, per, data):
    keep = data.draw(st.integers(1, per)) * groups
    stay = structured.kept(torch.rand(groups * per), keep, groups)
    assert len(stay) == keep and all(((stay // per) == g).sum() == keep // groups for g in range(groups)) and (stay.diff() > 0).all()

def refused(text, call, *args, **more):
    with pytest.raises(UsageError, match=text): call(*args, **more)

def test_bad_input_is_named():
    m = made("llama")
    for share in (1, 1.5, -.1): refused("out of range", structured.prune_mlp, m, share=share)
    refused("either keep", structured.prune_mlp, m)
    refused("either keep", structured.prune_mlp, m, keep=3, share=.5)
    refused("at least", structured.prune_mlp, m, keep=0)
    refused("at least", structured.prune_mlp, m, keep=49)
    refused("at least", structured.prune_layers, m, share=.9)
    refused("at least", structured.prune_heads, m, share=.99)
    refused("not a number", structured.prune_mlp, m, keep=2.5)
    refused("keep=", structured.prune_layers, m, keep=[])
    refused("keep=", structured.prune_layers, m, keep=[0, 9])
    refused("unknown score|score", structured.scores, m, "mlp", "magnitud")
    refused("unit", structured.scores, m, "mpl")
    refused("pass batches", structured.scores, m, "mlp", "activation")
    refused("empty", structured.scores, m, "mlp", "activation", [])
    refused("shape", structured.scores, m, "mlp", "activation", [dict(input_ids=torch.ones(3, dtype=torch.long))])
    refused("multiple", structured.prune_hidden, m, keep=15)
    refused("NaN", structured.prune_mlp, m, keep=3, score=[torch.full((48,), float("nan"))] * 3)

def test_llama_wants_a_head_count_that_divides():
    refused("divide", structured.prune_heads, made("llama"), keep=3)
    assert structured.prune_heads(made("mistral"), keep=2)[0].model.config.num_attention_heads == 2

def test_grouped_heads_go_in_step():
    refused("multiple of 2", structured.prune_heads, made("qwen2"), keep=3)

@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "opt"])
def test_heads_that_would_not_reload_are_refused_with_a_way_out(name): refused("prune_hidden", structured.prune_heads, made(name), keep=2)

def test_experts_are_refused():
    refused("experts", structured.prune_mlp, made("mixtral"), keep=8)
    refused("experts", structured.prune_hidden, made("mixtral"), keep=16)

def test_an_encoder_without_a_head_has_no_loss():
    refused("no loss", structured.scores, made("bert", "encoder"), "mlp", "gradient", batches())
    refused("labels", structured.scores, made("bert"), "mlp", "gradient", batches())
    assert structured.prune_mlp(made("bert", "encoder"), keep=8, score="activation", batches=batches())[0].model.config.intermediate_size == 8

def test_what_is_quantized_is_refused():
    m = made("llama")
    q = Loaded(torch.ao.quantization.quantize_dynamic(copy.deepcopy(m.model), {torch.nn.Linear}), None, "q", "random", "causal-lm")
    for cut in (structured.prune_mlp, structured.prune_heads, structured.prune_hidden, structured.prune_layers): refused("already quantized", cut, q, keep=2)

def test_an_unknown_family_can_lose_layers_only():
    m = made("llama")
    m.model.config.model_type = "lama"
    refused("prune_layers", structured.prune_mlp, m, keep=8)

def test_bfloat16_and_training_mode_are_kept():
    m = made("llama")
    m.model.bfloat16().train()
    small, _ = structured.prune_mlp(m, keep=8)
    assert small.dtype == "bfloat16" and small.model.training

def test_width_changes_no_number_of_operations():
    from llmlab.kit import measure
    m = made("llama")
    cut = {"whole": m, "narrow": structured.prune_mlp(m, share=.5)[0], "shallow": structured.prune_layers(m, keep=1)[0]}
    calls = {n: lambda o=o: o.model(torch.arange(8)[None]) for n, o in cut.items()}
    counted = structured.ops_by_depth(cut, calls)
    assert counted == {n: measure.count_ops(f) for n, f in calls.items()} and counted["shallow"] < counted["narrow"] == counted["whole"]
