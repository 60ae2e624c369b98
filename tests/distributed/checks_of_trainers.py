"""The recipes of docs/distributed.md, as trainers put them together: parameters after a step are those of one
process."""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from checks_of_parts import close
from torch.distributed.tensor import DTensor, Shard

import fastdiff
from fastdiff.distributed import Part, data_parallel

OBJECTIVE = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "cosmap")
X0 = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))  # [batch, tokens, channels]


class Mixer(torch.nn.Module):
    """Works on each token by itself, so tokens may lie anywhere."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)

    def forward(self, x, t):
        return self.out(torch.relu(self.inside(x) + t.to(x.dtype).reshape(-1, 1, 1)))


def network():
    torch.manual_seed(1)
    return Mixer()


def single():
    """The gradients of one process that has everything."""
    model, noised = network(), OBJECTIVE.noise(X0, seed=3)
    OBJECTIVE.loss(model(noised.model_input, noised.model_time), noised).backward()
    return [p.grad for p in model.parameters()]


def check_fsdp(rank):
    """fully_shard averages; its gradients are DTensors of the parameters' slices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    sizes = [3, 1, 2, 2]
    x0 = X0.split(sizes)[rank]
    noised = OBJECTIVE.noise(x0, seed=3, part=Part.batches(x0, sizes))
    OBJECTIVE.loss(model(noised.model_input, noised.model_time), noised).backward()
    for p, want in zip(model.parameters(), single()):
        close(p.grad.full_tensor(), want, float(want.abs().max()), "FSDP")


def check_sequence_parallel(rank):
    """Two data-parallel groups of two ranks, which share tokens; gradients averaged over all four."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    data_parallel(mesh["dp"])
    try:
        model = DistributedDataParallel(network())
        part = Part.placed(X0.shape, mesh, [Shard(0), Shard(1)])
        batch, tokens = part.start[:2]
        x0 = X0[batch : batch + 4, tokens : tokens + 3]
        noised = OBJECTIVE.noise(x0, seed=3, part=part)
        OBJECTIVE.loss(model(noised.model_input, noised.model_time), noised).backward()
        for p, want in zip(model.parameters(), single()):
            close(p.grad, want, float(want.abs().max()), "sequence parallel")
    finally:
        data_parallel(None)


def check_accumulation(rank):
    """Several micro-batches a step: the loss of each has its share of the step's."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    for k in range(2):
        micro = X0[4 * k : 4 * k + 4]
        x0 = micro[rank : rank + 1]
        noised = OBJECTIVE.noise(x0, seed=3, sample_offset=4 * k, part=Part.batches(x0, [1] * 4))
        loss = OBJECTIVE.loss(model(noised.model_input, noised.model_time), noised) / 2
        loss.backward()
    for p, want in zip(model.parameters(), single()):
        close(p.grad, want, float(want.abs().max()), "accumulation")


def check_the_gradient_along_with_the_loss(rank):
    """DDP's and FSDP's hooks hang on the network: ``prediction.backward(gradient)`` gives what ``loss.backward()``
    does, to the bit, accumulated too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def gradients(model, at_once):
        for part in range(2):
            noised = OBJECTIVE.noise(X0[2 * rank : 2 * rank + 2], seed=part, sample_offset=2 * rank)
            prediction = model(noised.model_input, noised.model_time)
            if at_once:
                prediction.backward(OBJECTIVE.loss_and_gradient(prediction, noised, 1 / 2)[1])
            else:
                (OBJECTIVE.loss(prediction, noised) / 2).backward()
        return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]

    for wrap in (DistributedDataParallel, lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (4,)))):
        found, expected = (gradients(wrap(network()), at_once) for at_once in (True, False))
        assert all(map(torch.equal, found, expected)) and found[0].abs().sum() > 0


def check_compiled(rank):
    """The network is compiled; noising and the loss run beside it."""
    assert dist.is_initialized()
    part = Part.batches(X0[2 * rank : 2 * rank + 2], [2] * 4)

    @torch.compile(backend="eager")
    def step(x0, m):
        noised = OBJECTIVE.noise(x0, seed=3, part=part)
        return noised.x_t, OBJECTIVE.loss(m, noised)

    x0 = X0[2 * rank : 2 * rank + 2]
    x_t, loss = step(x0, torch.zeros_like(x0))
    whole = OBJECTIVE.noise(X0, seed=3)
    want = OBJECTIVE.loss(torch.zeros_like(X0), whole)
    close(loss, want, float(want), "compiled")
    assert torch.equal(x_t, whole.x_t[2 * rank : 2 * rank + 2])


def check_the_documents_blocks(rank):
    """All of docs/distributed.md, in order."""
    document = Path(__file__).parents[2] / "docs" / "distributed.md"
    if not document.is_file():  # not in an installed package
        return
    torch.manual_seed(0)
    shard = slice(2 * rank, 2 * rank + 2)
    names = {
        "device": "cpu", "ranks": 4, "objective": OBJECTIVE, "fastdiff": fastdiff, "network": network(),
        "sharded_network": network(), "model_of_tokens": network(), "x0": X0[shard], "mask": torch.ones(2, 6),
        "tokens_here": X0[4 * (rank // 2) :][:4, 3 * (rank % 2) :][:, :3], "run": 1, "epoch": 2,
        "index": torch.arange(8)[shard], "prediction_here": X0[shard],
    }  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.M | re.S)
    try:
        for number, code in enumerate(blocks):
            if "data.to_local" in code:
                names["data"] = DTensor.from_local(X0[shard], names["mesh"], [Shard(0), Shard(0)])
                names["prediction"] = names["data"] * 0.5
            exec(compile(code, f"docs/distributed.md, block {number + 1}", "exec"), names)
    finally:
        data_parallel(None)
    every = [None] * 4
    dist.all_gather_object(every, float(names["loss"]))
    assert len(set(every)) == 1
    for name in ("network", "model_of_tokens"):
        assert all(p.grad.isfinite().all() for p in names[name].parameters())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
