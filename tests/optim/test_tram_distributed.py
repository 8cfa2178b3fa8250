"""TRAM over two gloo processes: data parallel, sharded by FSDP2, and inside a Trainer, against one process."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import leave
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_trust.optim.predictions import kl_rows
from trl_trust.optim.tram import TRAM


WORLD, STEPS, ACCUMULATION = 2, 4, 2


def build(fused=False):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).double()
    if fused:
        add_fused_lm_head(model)
    return model


def batch(index, rows=3):
    """Rows of equal lengths, so that a mean over two batches is the mean of their means."""
    ids = torch.randint(1, 29, (rows, 8), generator=torch.Generator().manual_seed(index))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def joined(*batches):
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


def loss_of(model, inputs, fused):
    if fused:
        return -model(**inputs, fused_lm_head=True).log_probs.mean()
    return model(**inputs).loss


def train(model, tram, micro_batches, fused=False, before_micro_batch=lambda last: None, steps=range(STEPS)):
    """`micro_batches(step, i)` gives what this process sees, ACCUMULATION a step."""
    distances = []
    for step in steps:
        for i in range(ACCUMULATION):
            last = i == ACCUMULATION - 1
            inputs = micro_batches(step, i)
            before_micro_batch(last)
            tram.backward(model, lambda inputs=inputs: loss_of(model, inputs, fused) / ACCUMULATION, last=last)
            distances.append(tram.metrics().get("tram/distance", 0.0))
        tram.step()
        tram.zero_grad()
    return distances


def optimizer(model, **options):
    return TRAM(torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), **options)


def index(step, i, rank):
    return (step * ACCUMULATION + i) * WORLD + rank


def worker(rank, port, body, *args):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    body(rank, *args)  # an exception travels to the test
    leave()


def spawn(body, *args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, body, *args), nprocs=WORLD)


def assert_equal(model, expected, what, tolerance=1e-10):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p = p.full_tensor() if isinstance(p, DTensor) else p
        assert torch.allclose(p, q, rtol=0, atol=tolerance), (what, name, (p - q).abs().max().item())


# --------------------------------------------------------------------------------------------------------------- DDP


def data_parallel_is_accumulation(rank):
    """With each rank's own distance, two ranks are two micro-batches: eps is a micro-batch's own either way."""
    for variant in ("prev", "init"):
        model = DistributedDataParallel(build())
        tram = optimizer(model, tram_variant=variant, tram_distance_scope="local")
        train(model, tram, lambda step, i: batch(index(step, i, rank)))

        expected = build()
        one = TRAM(torch.optim.AdamW(expected.parameters(), lr=1e-2, foreach=False), tram_variant=variant)
        one.scope = "local"
        parts = WORLD * ACCUMULATION
        for step in range(STEPS):
            for i in range(parts):
                inputs = batch(step * parts + i)
                one.backward(expected, lambda m=expected, x=inputs, n=parts: m(**x).loss / n, last=i == parts - 1)
            one.step()
            one.zero_grad()
        assert_equal(model, expected, variant)


def global_distance_is_pooled(rank):
    """The mean over the positions of both ranks, whose batches differ in size: not the mean of their means."""
    data = lambda step, i: batch(index(step, i, rank), rows=1 + 3 * rank)
    model, first = DistributedDataParallel(build()), build()
    tram = optimizer(model)
    train(model, tram, data, steps=range(1))
    second = copy.deepcopy(model.module)
    (_, distance) = train(model, tram, data, steps=range(1, 2))
    divergences = []
    for r in range(WORLD):
        inputs = batch(index(1, 1, r), rows=1 + 3 * r)
        valid = inputs["labels"][:, 1:] != -100
        with torch.no_grad():
            divergences.append(kl_rows(*(m(**inputs).logits[:, :-1][valid] for m in (first, second))))
    pooled = torch.cat(divergences).mean().item()
    assert distance == pytest.approx(pooled, rel=1e-9)
    assert abs(distance - torch.stack([d.mean() for d in divergences]).mean().item()) > 1e-3 * distance


# -------------------------------------------------------------------------------------------------------------- FSDP2


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    return model


def sharded_is_one_process(rank):
    """Gradients are reduced before the climb, so both ranks share one eps: one process with the joined batches."""
    for variant, fused in (("prev", False), ("prev", True), ("init", True), ("fisher", False)):
        model = shard(build(fused))
        options = {"tram_variant": variant}
        if variant == "fisher":
            options["tram_noise_std"] = 1e-13  # ranks and one process draw different noise
        tram = optimizer(model, **options)
        distances = train(
            model,
            tram,
            lambda step, i: batch(index(step, i, rank)),
            fused,
            # what accelerate's no_sync does in accumulation
            before_micro_batch=lambda last, model=model: model.set_requires_gradient_sync(last),
        )
        if tram.anchor:
            assert all(isinstance(a, DTensor) for a in tram.anchor.values())

        if rank == 0:
            group, dist.is_initialized = dist.is_initialized, lambda: False  # this process alone
            expected = build(fused)
            one = optimizer(expected, **options)
            reference = train(
                expected,
                one,
                lambda step, i: joined(*(batch(index(step, i, r)) for r in range(WORLD))),
                fused,
            )
            dist.is_initialized = group
            torch.testing.assert_close(torch.tensor(distances), torch.tensor(reference), rtol=1e-5, atol=1e-7)
            assert variant == "fisher" or min(reference[ACCUMULATION:]) > 1e-6
        # TRL's fused head works in float32; AdamW divides what little there is by its size.
        tolerance = 1e-6 if fused or variant == "fisher" else 1e-10
        state = [expected if rank == 0 else None]
        dist.broadcast_object_list(state, src=0)
        assert_equal(model, state[0], (variant, fused), tolerance=tolerance)


def sharded_resume_is_exact(rank):
    options = StateDictOptions(full_state_dict=False)
    data = lambda step, i: batch(index(step, i, rank))
    model = shard(build())
    tram = optimizer(model)
    train(model, tram, data, steps=range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, tram, options=options))
    resumed_model = shard(build())
    with torch.no_grad():
        for p, q in zip(resumed_model.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    resumed = optimizer(resumed_model)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    assert resumed.steps == 2
    train(model, tram, data, steps=range(2, 4))
    train(resumed_model, resumed, data, steps=range(2, 4))
    for (name, p), q in zip(model.named_parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name


BODIES = (data_parallel_is_accumulation, global_distance_is_pooled, sharded_is_one_process, sharded_resume_is_exact)


def in_turn(rank):
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for body in BODIES:
        body(rank)


def test_data_parallel_and_sharded():
    """All in one launch, since starting processes takes longer than the work; the traceback names the body."""
    spawn(in_turn)


# ------------------------------------------------------------------------------------------------------------ Trainer


def supervised(model_path, folder, accumulation, scope):
    from test_tram_trainers import args_for, sums

    args = args_for(
        SFTConfig,
        folder,
        optim="tram_adamw",
        optim_args=f"tram_distance_scope={scope}",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        max_steps=3,
        ddp_find_unused_parameters=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=args,
        train_dataset=sums(),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def trainer_worker(rank, model_path, folder):
    import sys

    sys.path[:0] = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    from tiny import tiny_config, tiny_run

    import trl_trust.optim  # noqa: F401

    trainer = supervised(model_path, folder, 2, "local")
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    distances = [row["tram/distance"] for row in trainer.state.log_history if "tram/distance" in row]
    if rank == 0:
        torch.save(trainer.model.state_dict(), f"{folder}/two.pt")
        torch.save(distances, f"{folder}/d.pt")
    args = tiny_config(GRPOConfig, folder, optim="tram_adamw", num_iterations=2, max_steps=3)
    trainer = tiny_run(GRPOTrainer, model_path, args)
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    other = parameters.clone()
    dist.broadcast(other, src=0)
    assert torch.equal(parameters, other)
    assert any(row.get("tram/distance", 0) > 0 for row in trainer.state.log_history)


def test_trainer_on_two_processes_is_the_trainer_with_twice_the_accumulation(tiny_model_path, tmp_path):
    spawn(trainer_worker, tiny_model_path, str(tmp_path))
    one = supervised(tiny_model_path, tmp_path, 4, "local")
    for (name, p), q in zip(one.model.state_dict().items(), torch.load(tmp_path / "two.pt").values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=name)
    distances = [row["tram/distance"] for row in one.state.log_history if "tram/distance" in row]
    assert distances == pytest.approx(torch.load(tmp_path / "d.pt"), rel=1e-3)
