import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_trust.optim import AuON, HybridAuON, MatrixOptimizer, Muon
from trl_trust.optim.auon import auon_direction
from trl_trust.optim.matrix import MAX_BATCH_NUMEL, shape_factor
from trl_trust.optim.routing import parse_split_sizes, route


TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    **TOKENS,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **TOKENS)
MOE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    **TOKENS,
}
QWEN_MOE = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **MOE)
GPT_OSS = GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **MOE)


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LLAMA).to(dtype)


def fill_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        fill_gradients(model, step)
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def rules(model, **options):
    return {r.name: r.rule for r in route(model, **options)}


def matrices(model, **options):
    return {name for name, rule in rules(model, **options).items() if rule == "matrix"}


# ---------------------------------------------------------------------------------------------------------- routing


def test_llama_with_an_untied_head():
    names = matrices(llama())
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in names} == projections
    assert len(names) == 14
    reasons = {r.name: r.reason for r in route(llama())}
    assert reasons["lm_head.weight"] == reasons["model.embed_tokens.weight"] == "embedding or head"


def test_gpt2_with_a_tied_head_and_transposed_weights():
    routes = {r.name: r for r in route(GPT2LMHeadModel(GPT2))}
    assert {name.split(".")[-2] for name, r in routes.items() if r.rule == "matrix"} == {"c_attn", "c_proj", "c_fc"}
    assert all(r.transposed for r in routes.values() if r.rule == "matrix")
    assert routes["transformer.wte.weight"].rule == routes["transformer.wpe.weight"].rule == "adamw"
    assert "lm_head.weight" not in routes  # one tensor, one route


def test_a_head_tied_by_hand_before_its_embedding_is_found_by_identity():
    model = nn.ModuleDict({"head": nn.Linear(4, 6, bias=False), "body": nn.Linear(4, 4), "table": nn.Embedding(6, 4)})
    model["table"].weight = model["head"].weight
    assert rules(model) == {"head.weight": "adamw", "body.weight": "matrix", "body.bias": "adamw"}


def test_experts_are_matrices_and_routers_are_not():
    routes = {r.name: r for r in route(Qwen3MoeForCausalLM(QWEN_MOE))}
    experts = routes["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.rule, experts.parameter.ndim, experts.transposed) == ("matrix", 3, False)
    assert (routes["model.layers.0.mlp.gate.weight"].rule, routes["model.layers.0.mlp.gate.weight"].reason) == (
        "adamw",
        "router",
    )
    routes = {r.name: r for r in route(GptOssForCausalLM(GPT_OSS))}
    assert routes["model.layers.0.mlp.experts.gate_up_proj"].transposed  # (experts, in, out) in this family
    for name in ("experts.gate_up_proj_bias", "router.weight", "router.bias"):
        assert routes[f"model.layers.0.mlp.{name}"].rule == "adamw"
    assert routes["model.layers.0.self_attn.sinks"].rule == "adamw"


def test_a_linear_called_gate_is_a_router_only_beside_experts():
    class Gated(nn.Module):
        def __init__(self, mixture):
            super().__init__()
            self.gate = nn.Linear(4, 4)
            if mixture:
                self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    assert "gate.weight" in matrices(Gated(False))
    assert matrices(Gated(True)) == {"experts.0.weight", "experts.1.weight"}


def test_a_classifier_is_outside_the_backbone():
    routes = {r.name: r for r in route(LlamaForSequenceClassification(LLAMA))}
    assert (routes["score.weight"].rule, routes["score.weight"].reason) == ("adamw", "outside the backbone")


def test_other_modules_go_to_adamw():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "narrow": nn.Linear(4, 1),
            "conv": nn.Conv2d(3, 4, 2),
            "conv1": nn.Conv1d(3, 4, 2),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    assert matrices(model) == {"linear.weight", "attention.out_proj.weight"}
    assert "attention.in_proj_weight" in matrices(model, matrix_pattern="in_proj_weight")


def test_lora_factors_are_matrices_and_can_be_sent_to_adamw():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    names = matrices(model)
    assert {re.search("lora_[AB]", name)[0] for name in names} == {"lora_A", "lora_B"}
    assert len(names) == 4  # two layers; the embedding's factors and the trained copy of the head are with AdamW
    assert rules(model)["base_model.model.lm_head.modules_to_save.default.weight"] == "adamw"
    assert not matrices(model, adamw_pattern="lora_")
    optimizer = Muon(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():  # B starts at 0, so A's gradient is exactly 0 at the first step
        if name in names:
            assert torch.equal(p, before[name]) == ("lora_A" in name)


def test_patterns_overrule_in_both_directions():
    names = matrices(llama(), matrix_pattern="lm_head", adamw_pattern=r"layers\.0")
    assert "lm_head.weight" in names and len(names) == 8


def test_every_trainable_parameter_is_in_exactly_one_group():
    for model in (llama(), GPT2LMHeadModel(GPT2), Qwen3MoeForCausalLM(QWEN_MOE), GptOssForCausalLM(GPT_OSS)):
        next(model.parameters()).requires_grad_(False)
        optimizer = AuON(model, lr=0.1)
        owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert optimizer.param_groups[0]["rule"] == "matrix"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix_pattern": "q_prej"}, r"no parameter matches \['q_prej'\]"),
        ({"adamw_pattern": "q_prej"}, "no parameter matches"),
        ({"split_sizes": {"q_prej": (8, 8)}}, "no parameter matches"),
        ({"matrix_pattern": "q_proj", "adamw_pattern": "layers.0"}, "matches both matrix_pattern='q_proj'"),
        ({"matrix_pattern": "norm"}, "needs two dimensions or more"),
        ({"split_sizes": {"q_proj": (8, 9)}}, "add up to 17"),
        ({"split_sizes": {"q_proj": (16,)}}, "two or more positive sizes"),
        ({"split_sizes": "q_proj"}, "two or more positive sizes"),
        ({"split_sizes": {"q_proj": (8, "x")}}, "two or more positive sizes"),
    ],
)
def test_bad_routing_raises(options, message):
    with pytest.raises(ValueError, match=message):
        AuON(llama(), lr=0.1, **options)


def test_split_sizes_have_a_text_form():
    assert parse_split_sizes("c_attn:4:4:8;(?:q|k)v:1:2") == {"c_attn": (4, 4, 8), "(?:q|k)v": (1, 2)}


def test_a_model_without_matrices_raises_with_the_routing():
    with pytest.raises(ValueError, match=r"no matrix parameter(.|\n)*weight +4x3 +adamw +embedding or head"):
        Muon(nn.Embedding(4, 3))
    with pytest.raises(ValueError, match="no matrix parameter"):
        AuON([{"params": [nn.Parameter(torch.ones(2, 2))], "rule": "adamw"}], lr=0.1)


def test_patterns_without_a_model_raise():
    with pytest.raises(ValueError, match="pass the model"):
        Muon([nn.Parameter(torch.ones(2, 2))], matrix_pattern="x")


def test_report_lists_every_parameter_once():
    model = GPT2LMHeadModel(GPT2)
    optimizer = Muon(
        model, lr=0.02, weight_decay=0.1, aux_weight_decay=0.3, split_sizes={"c_attn.weight": (16, 16, 16)}
    )
    lines = optimizer.routing_report().splitlines()
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(name for name, _ in model.named_parameters())
    (c_fc,) = (line for line in lines if "h.0.mlp.c_fc.weight" in line)
    assert c_fc.split() == [
        "transformer.h.0.mlp.c_fc.weight",
        "16x64",
        "transposed",
        "matrix",
        "Conv1D",
        "0.02",
        "0.1",
        "2",
    ]
    (c_attn,) = (line for line in lines if "h.0.attn.c_attn.weight" in line)
    assert "16x48 transposed split 16+16+16" in c_attn and c_attn.endswith("1, 1, 1")
    assert "matrix: 8 tensors, 6,144 elements (lr=0.02" in optimizer.routing_summary()


# ------------------------------------------------------------------------------------------------------------ decay


def test_decay_spares_biases_norms_and_vectors():
    decayed = {r.name for r in route(GPT2LMHeadModel(GPT2)) if r.decay}
    assert decayed == matrices(GPT2LMHeadModel(GPT2)) | {"transformer.wte.weight", "transformer.wpe.weight"}
    assert not any(r.decay for r in route(nn.Linear(3, 3), no_decay={"weight"}))


def test_decay_uses_the_group_learning_rate():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AuON(model, lr=0.1, weight_decay=0.5, aux_lr=0.2, aux_weight_decay=0.25, shape_scale="original")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in matrices(model) else 1.0 if p.ndim < 2 else 1 - 0.2 * 0.25
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adamw_half_is_torch_adamw_to_the_bit(dtype):
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    settings = {"betas": (0.8, 0.99), "eps": 1e-9}
    ours = Muon(model, lr=0.02, aux_lr=3e-3, aux_betas=(0.8, 0.99), aux_eps=1e-9, aux_weight_decay=0.1)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if n not in matrices(twin) and (p.ndim < 2) == vector]}
        for vector in (False, True)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    theirs = torch.optim.AdamW(groups, lr=3e-3, **settings)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=4) for o in (ours, theirs)]
    for step in range(5):
        for m, o, schedule in zip((model, twin), (ours, theirs), schedules, strict=True):
            fill_gradients(m, step)
            o.step()
            schedule.step()
    for group in theirs.param_groups:
        for q in group["params"]:
            name = next(n for n, other in twin.named_parameters() if other is q)
            p = dict(model.named_parameters())[name]
            assert torch.equal(p, q), name
            assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])


# ------------------------------------------------------------------------------------------------------------ state


def optimizers(model):
    return [AuON(model, lr=0.1), HybridAuON(model, lr=0.02, variant="repo"), Muon(model, lr=0.02, weight_decay=0.1)]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_resume_is_exact(which, dtype):
    model = llama(dtype=dtype)
    optimizer = optimizers(model)[which]
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed_model = copy.deepcopy(model)
    resumed = optimizers(resumed_model)[which]
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))  # only plain types
    for p in resumed_model.parameters():
        for key, value in resumed.state[p].items():
            assert value.dtype == torch.float32, key
    train(model, optimizer, 3, start=3)
    train(resumed_model, resumed, 3, start=3)
    assert equal(weights(model), weights(resumed_model))


def test_state_is_lazy_and_complete_after_a_step_without_movement():
    model = llama()
    before = weights(model)
    optimizer = Muon(model, lr=0.02, weight_decay=0.1)
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate does this while it is empty
    for group in optimizer.param_groups:  # as torch's distributed checkpoint makes an optimizer create its state
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(before, weights(model))
    keys = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    for name, rule in rules(model).items():
        assert keys[name] == ({"momentum_buffer"} if rule == "matrix" else {"step", "exp_avg", "exp_avg_sq"})
    train(model, optimizer, 1)
    assert keys == {name: set(optimizer.state[p]) for name, p in model.named_parameters()}


def test_copies_and_pickles_go_on_exactly():
    model = llama()
    optimizer = AuON(model, lr=0.1)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 2, start=2)
    train(twin_model, twin, 2, start=2)
    train(pickled_model, pickled, 2, start=2)
    assert equal(weights(model), weights(twin_model)) and equal(weights(model), weights(pickled_model))
    assert twin.routing_report() == optimizer.routing_report() == pickled.routing_report()


def test_a_checkpoint_from_before_a_setting_existed_loads():
    model = llama()
    state = AuON(model, lr=0.1, variant="repo").state_dict()
    for group in state["param_groups"]:
        group.pop("brake_scale", None)
    optimizer = AuON(model, lr=0.1)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["brake_scale"] == "frobenius"
    assert optimizer.param_groups[0]["variant"] == "repo"


# --------------------------------------------------------------------------------------------------------- the step


def test_gradients_are_untouched_and_closures_run_first_with_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(dtype=dtype)
        for optimizer in optimizers(model):
            fill_gradients(model)
            before = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert equal(before, [p.grad for p in model.parameters()])
    model = llama()
    optimizer = AuON(model, lr=0.1)
    at_start = weights(model)

    def closure():
        assert torch.is_grad_enabled() and equal(at_start, weights(model))
        optimizer.zero_grad()
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > 0 and not equal(at_start, weights(model))


def test_parameters_without_a_gradient_are_left_alone():
    model = llama()
    optimizer = Muon(model, weight_decay=0.1, aux_weight_decay=0.1)
    fill_gradients(model)
    frozen = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    frozen.grad = model.lm_head.weight.grad = None
    kept = frozen.detach().clone(), model.lm_head.weight.detach().clone()
    optimizer.step()
    assert equal(kept, (frozen, model.lm_head.weight))
    assert not optimizer.state[frozen]


@pytest.mark.parametrize("split", [False, True])
def test_equal_shapes_in_one_batch_equal_one_by_one(split, monkeypatch):
    results = []
    for limit in (2**26, 1):  # all of a shape at once, or one at a time
        monkeypatch.setitem(MAX_BATCH_NUMEL, "cpu", limit)
        model = llama(dtype=torch.float64)
        options = {"split_sizes": {"gate_proj": (8, 16)}} if split else {}
        train(model, Muon(model, ns_dtype="float32", **options), 3)
        results.append(weights(model))
    for batched, single in zip(*results, strict=True):
        torch.testing.assert_close(batched, single, rtol=1e-9, atol=1e-12)


def test_split_blocks_are_matrices_of_their_own():
    weight = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = {"lr": 0.1, "shape_scale": "original", "ns_dtype": "float32", "momentum": 0.0}
    fused, blocks = nn.Parameter(weight.clone()), [nn.Parameter(b.clone()) for b in weight.split((2, 5, 2))]
    transposed = nn.Parameter(weight.T.clone())
    fused.grad, transposed.grad = grad.clone(), grad.T.clone()
    for block, part in zip(blocks, grad.split((2, 5, 2)), strict=True):
        block.grad = part.clone()
    Muon([{"params": [fused], "split_sizes": (2, 5, 2)}], **settings).step()
    Muon([{"params": [transposed], "split_sizes": (2, 5, 2), "transposed": True}], **settings).step()
    Muon(blocks, **settings).step()
    torch.testing.assert_close(fused.detach(), torch.cat([b.detach() for b in blocks]))
    torch.testing.assert_close(transposed.detach().T, fused.detach())


def test_experts_are_stepped_one_by_one():
    stack = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    experts, singles = nn.Parameter(stack.clone()), [nn.Parameter(m.clone()) for m in stack]
    experts.grad = stack.sin()
    for single, part in zip(singles, stack.sin(), strict=True):
        single.grad = part.clone()
    Muon([experts], ns_dtype="float32").step()
    Muon(singles, ns_dtype="float32").step()
    torch.testing.assert_close(experts.detach(), torch.stack([s.detach() for s in singles]))


def test_a_rule_with_state_gets_one_mapping_a_matrix_or_block():
    class Counting(MatrixOptimizer):
        shared_momentum = False

        def direction(self, updates, states, group):
            for state in states:
                state["seen"] = state.get("seen", 0) + updates.shape[-2]
                assert list(state) == ["seen"] and len(state) == 1
            return updates

    p, q = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(6, 2))
    optimizer = Counting([{"params": [p], "split_sizes": (2, 4)}, {"params": [q]}], 1.0, matrix_defaults={})
    for _ in range(2):
        p.grad, q.grad = torch.ones(6, 2), torch.ones(6, 2)
        optimizer.step()
    assert optimizer.state[p] == {"block0.seen": 4, "block1.seen": 8}
    assert optimizer.state[q] == {"seen": 12}
    assert torch.equal(q.detach(), torch.full((6, 2), -2.0))  # gradients as they are: no momentum, no buffer


def test_a_tensor_as_learning_rate():
    results = []
    for lr in (0.05, torch.tensor(0.05), torch.tensor([0.05])):
        model = llama()
        train(model, AuON(model, lr=lr, weight_decay=0.1, aux_weight_decay=0.1), 2)
        results.append(weights(model))
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert torch.equal(b, c)


def test_no_host_synchronisation():
    # A meta tensor has no values: any .item(), bool() or .tolist() on one raises.
    params = [nn.Parameter(torch.empty(8, 6, device="meta")) for _ in range(3)]
    for optimizer in optimizers_of(params):
        for _ in range(2):
            for p in params:
                p.grad = torch.empty(8, 6, device="meta")
            optimizer.step()
        assert all("momentum_buffer" in optimizer.state[p] for p in params)


def optimizers_of(params):
    return [
        AuON(params, lr=0.1, weight_decay=0.1),
        AuON(params, lr=0.1, variant="repo", brake_scale="rms", shape_scale="original"),
        HybridAuON(params, lr=0.02, ns_dtype="bfloat16"),
        Muon(params, lr=torch.tensor(0.02), weight_decay=0.1),
    ]


def test_low_precision_parameters_are_rounded_once():
    p = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer = AuON([p], lr=30.0, weight_decay=1e-3, momentum=0.0)
    optimizer.step()
    exact = (1 - 30.0 * 1e-3) - 30.0 * auon_direction(p.grad.double())
    half_a_step = exact.abs() * 2**-8  # of bfloat16, whose eight bits are rounded to nearest
    assert ((p.detach().double() - exact).abs() <= half_a_step + 1e-6).all()


def test_non_finite_gradients_are_skipped_and_counted_on_request():
    for guarded in (True, False):
        model = llama()
        optimizer = Muon(model, skip_nonfinite=guarded, weight_decay=0.1)
        train(model, optimizer, 1)
        before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
            fill_gradients(model, 5)
            dict(model.named_parameters())[name].grad.view(-1)[3] = float("inf" if "head" in name else "nan")
            optimizer.step()
        if guarded:
            assert equal(before, weights(model)) and optimizer.skipped_steps == 2
            for index, entries in optimizer.state_dict()["state"].items():
                assert equal(entries.values(), state[index].values())
            train(model, optimizer, 1)
            assert optimizer.skipped_steps == 2 and not equal(before, weights(model))
        else:
            assert not equal(before, weights(model)) and optimizer.skipped_steps == 0


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"the_name has shape \(3,\); a matrix group needs two dimensions or more"),
        (torch.ones(2, 2, dtype=torch.complex64), "the_name has dtype torch.complex64"),
        (torch.ones(0, 2), "the_name is empty"),
        (torch.ones(2, 2).to_sparse(), "the_name has layout torch.sparse_coo"),
    ],
)
def test_unusable_parameters_raise_with_their_name(value, message):
    good = ("good", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=message):
        AuON([good, ("the_name", nn.Parameter(value))], lr=0.1)
    optimizer = AuON([good], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("the_name", nn.Parameter(value))]})
    assert len(optimizer.param_groups) == 1  # as before the attempt


def test_integer_parameters_raise():
    with pytest.raises(ValueError, match="dtype torch.int64"):
        AuON([nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)], lr=0.1)


def test_sparse_gradients_raise():
    table = nn.Embedding(5, 3, sparse=True)
    model = nn.Sequential(table, nn.Linear(3, 3))
    optimizer = AuON(model, lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"0.weight has a sparse gradient"):
        optimizer.step()


def test_unknown_rules_and_keys_raise():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="rule='muon'"):
        AuON([{"params": [p], "rule": "muon"}], lr=0.1)
    with pytest.raises(ValueError, match=r"unknown keys \['weight_decy'\] in a group with rule 'matrix'"):
        AuON([{"params": [p], "weight_decy": 0.1}], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        AuON([{"params": [p]}, {"params": [p], "rule": "adamw"}], lr=0.1)


def test_empty_groups_are_accepted():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = AuON([{"params": []}, {"params": [p]}, {"params": [], "rule": "adamw"}], lr=0.1)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert (p < 1).all()


def test_flattened_parameters_are_refused():
    # As ZeRO-1 and 2 do it, whose engine was not made known: one flat partition for all parameters of a group.
    model = llama()
    optimizer = Muon(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"arrives as shape \(\d+,\): FSDP1 .* optimizer.bind\(engine\)"):
        optimizer.step()
    # FSDP1 with use_orig_params=True: 1-D views.
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.ones(256))
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \(256,\), it was flattened"):
        Muon(model)


def test_parameters_that_zero_3_has_taken_are_routed_by_their_shape():
    """An empty tensor that remembers its shape."""
    whole, model = Muon(llama()), llama()
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert Muon(model).routing_report() == whole.routing_report()
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(16,\); a matrix group needs two dimensions"):
        Muon([model.model.norm.weight])


def test_shape_factors():
    assert [shape_factor(s, 9, 4) for s in (None, "original", "match_rms_adamw")] == pytest.approx([1, 1.5, 0.6])
    assert shape_factor("original", 4, 9) == 1.0


def test_a_grad_scaler_and_a_scheduler_drive_it():
    model = llama()
    optimizer = AuON(model, lr=0.1, aux_lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    assert not equal(before, weights(model))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005, 0.005])
