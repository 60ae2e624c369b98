"""What four processes find of noise and losses of parts. The truth is a single process that has the whole: each rank
computes it too."""

import dataclasses
import functools
import itertools
import math

import torch
import torch.distributed as dist

import fastdiff
from fastdiff.backends import native
from fastdiff.distributed import Part

GROUPS = {}


def group_of(ranks):
    """The first ranks of the four. Made by all of them at the same time."""
    if not GROUPS:
        for size in (1, 2, 3, 4):
            GROUPS[size] = dist.new_group(range(size))
    return GROUPS[ranks]


# How many of 5 each rank has, along a dimension: uneven, and nothing.
UNEVEN = {1: [5], 2: [2, 3], 3: [2, 0, 3], 4: [1, 0, 3, 1]}
SHAPE = (5, 4, 5, 6)  # of images; as videos of 4 or 5 frames, or as tokens, it is the same


def slices(ranks, dims):
    """(start, sizes) of each rank: uneven along one dimension; in a grid along two, for four ranks."""
    if len(dims) == 2:
        cuts = [[(0, 2), (2, SHAPE[d] - 2)] for d in dims]
        pairs = [dict(zip(dims, pair)) for pair in itertools.product(*cuts)]
    else:
        sizes = UNEVEN[ranks] if SHAPE[dims[0]] == 5 else [SHAPE[dims[0]] // ranks] * ranks
        starts = [sum(sizes[:k]) for k in range(ranks)]
        pairs = [{dims[0]: pair} for pair in zip(starts, sizes)]
    return [
        (tuple(p.get(d, (0, 0))[0] for d in range(4)), tuple(p.get(d, (0, SHAPE[d]))[1] for d in range(4)))
        for p in pairs
    ]  # fmt: skip


def cut(tensor, start, sizes):
    """The slice of a tensor, which is broadcast along dimensions of size 1, or has fewer dimensions."""
    if tensor is None or not isinstance(tensor, torch.Tensor):
        return tensor
    for d in range(tensor.ndim):
        if tensor.shape[d] != 1:
            tensor = tensor.narrow(d, start[d], sizes[d])
    return tensor


SPLITS = [(1, (0,)), (2, (0,)), (3, (0,)), (4, (0,)), (2, (1,)), (4, (1,)), (3, (2,)), (4, (2,)), (2, (3,)), (3, (3,)),
          (4, (0, 2)), (4, (2, 3))]  # fmt: skip


def every_part(rank):
    """(part, start, sizes) for each way to split, averaged or not; Nones where this rank takes no part in it."""
    for averaged, (ranks, dims) in itertools.product((True, False), SPLITS):
        group = group_of(ranks)
        for split in (None, dims):
            if rank < ranks:
                start, sizes = slices(ranks, dims)[rank]
                yield Part(SHAPE, start, group, averaged, split), start, sizes
            else:
                yield None, None, None


def parts(rank, averaged=True):
    """Those that this rank takes part in."""
    return (of for of in every_part(rank) if of[0] is not None and of[0].averaged == averaged)


@functools.cache
def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, SHAPE, generator=generator, dtype=torch.float64)
    return [draw().to(dtype) for _ in range(5)]


def objectives():
    vp, flow = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()
    yield fastdiff.Objective(vp, "v_prediction", "min_snr", "pseudo_huber")
    yield fastdiff.Objective(flow, "flow", "cosmap", timesteps="logit_normal", error_space="sample")
    yield fastdiff.Objective(vp, noise_offset=0.1)
    yield fastdiff.Objective(flow, "flow", input_perturbation=0.1, noise_offset=0.2, noise_offset_dim=2)
    yield fastdiff.Objective(flow, "flow", timesteps=fastdiff.timesteps.Stratified())


def same(a, b):
    assert a.dtype == b.dtype and torch.equal(a, b), (a, b)


def check_noise(rank):
    """The slice of what the whole has, to the bit: t, noise and x_t, also of images and of ids."""
    x0, ids = data()[0], torch.tensor([7, 2**40, 3, 7, 0])
    for objective in objectives():
        whole = objective.noise(x0, seed=5, sample_offset=11)
        for part, start, sizes in parts(rank):
            got = objective.noise(cut(x0, start, sizes), seed=5, sample_offset=11, part=part)
            for name in ("t", "x_t", "noise"):
                same(getattr(got, name), cut(getattr(whole, name), start, sizes))
            assert got.part is part
        if isinstance(objective.timesteps, fastdiff.timesteps.Stratified):
            continue
        whole = objective.noise(x0, seed=5, ids=ids)
        for part, start, sizes in parts(rank):
            got = objective.noise(cut(x0, start, sizes), seed=5, ids=cut(ids, start, sizes), part=part)
            same(got.t, cut(whole.t, start, sizes))
            same(got.x_t, cut(whole.x_t, start, sizes))


def check_an_agreed_seed(rank):
    """Without a seed the ranks of a group agree on one, though their generators differ."""
    objective, x0 = next(objectives()), data()[0]
    torch.manual_seed(rank)
    for part, start, sizes in parts(rank):
        got = objective.noise(cut(x0, start, sizes), part=part)
        every = [None] * part.size
        dist.all_gather_object(every, (got.t.tolist(), got.noise, start, sizes), group=part.group)
        noise = torch.full(SHAPE, math.nan)
        for _, n, at, size in every:
            cut(noise, at, size).copy_(n)
        assert not noise.isnan().any() and noise.std() > 0.5
        if part.split == (1,) and part.size == 4:
            assert len({str(of[0]) for of in every}) == 1  # the same samples have the same t


def close(got, want, scale, what):
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape)
    error = (got.double() - want.double()).abs().max() if want.numel() else 0.0
    assert error <= 1e-6 * scale, (what, float(error), scale)


def losses():
    """(t, options) for many losses; the tensors are those of the whole."""
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.rand, generator=generator)
    t_of = {"sample": draw(5), "channel": draw(5, 4), "row": draw(5, 1, 5, 1), "token": draw(5, 4, 5)}
    masks = {
        "none": None, "samples": torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0]), "broadcast": draw(5, 1, 5, 6) > 0.7,
        "elements": draw(SHAPE) > 0.5, "shared": draw(1, 4, 1, 6).round(), "most": torch.zeros(SHAPE, dtype=torch.bool),
    }  # fmt: skip
    masks["elements"][1] = masks["elements"][3, :, 2] = False
    masks["most"][4, 3, 4, 5] = True
    plain = [(kind, "none", "none", reduction) for kind in t_of for reduction in ("mean", "sum", "none")]
    masked = [
        (kind, mask, normalization, reduction)
        for k, (kind, mask, normalization) in enumerate(
            itertools.product(t_of, list(masks)[1:], ("none", "row", "sample", "global"))
        )
        for reduction in (("mean", "none") if k % 2 else ("mean",))
    ]
    elements = [(kind, "none", "none", "elements") for kind in t_of]
    for k, (kind, mask, normalization, reduction) in enumerate(plain + masked + elements):
        t, options = t_of[kind], {"mask": masks[mask], "mask_normalization": normalization, "reduction": reduction}
        if k % 3 == 1:
            options["weight"] = draw(t.shape)
        if k % 7 == 3 and t.ndim != 3:
            options["weight"] = draw(5, 1, 5, 6) + 0.5  # one an element
        yield t, options


def check_losses(rank):
    """Value and gradient of every normalization and reduction, for times of samples, frames, rows and tokens."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "cosmap", "pseudo_huber")
    x0, n, m, target, y = data()
    every = list(losses())
    wholes = []
    for k, (t, options) in enumerate(every):
        prediction = m.clone().requires_grad_()
        extra = {"target": target} if k % 5 == 2 else {"y": y, "r": 0.3} if k % 5 == 4 else {}
        value = objective.loss(prediction, objective.noise(x0, t, n), **options, **extra)
        factors = torch.linspace(0.5, 2, value.numel()).reshape(value.shape) if value.ndim else torch.tensor(1.0)
        (value * factors).sum().backward()
        wholes.append((value.detach(), factors, prediction.grad, extra))
    for number, (part, start, sizes) in enumerate(every_part(rank)):
        if part is None:
            continue
        for k, ((t, options), (value, factors, gradient, extra)) in enumerate(zip(every, wholes)):
            if (k + number) % 5:  # each of them for some parts
                continue
            prediction = cut(m, start, sizes).clone().requires_grad_()
            mine = {name: cut(given, start, sizes) for name, given in (options | extra).items()}
            told = dataclasses.replace(part, rows=(0, 2)) if t.ndim == 4 else part
            noised = objective.noise(*(cut(of, start, sizes) for of in (x0, t, n)), part=told)
            what = part.size, part.split, start, sizes, tuple(t.shape), options, extra.keys()
            try:
                got = objective.loss(prediction, noised, **mine)
            except Exception as error:
                raise AssertionError(what) from error
            want = cut(value, start, sizes)
            if value.ndim and "sample" in options["mask_normalization"]:
                want = value[start[0] : start[0] + sizes[0]]
                factors_here = factors[start[0] : start[0] + sizes[0]]
            else:
                factors_here = cut(factors, start, sizes)
            close(got.detach(), want, float(value.abs().max()), what)
            (got * factors_here).sum().backward()
            scale = float(gradient.abs().max())
            averaged = part.averaged and options["reduction"] != "elements"  # which the caller reduces
            close(prediction.grad / (part.size if averaged else 1), cut(gradient, start, sizes), scale, what)
            if options["reduction"] not in ("none", "elements") and k % 3 == 0:
                loss, at_once = objective.loss_and_gradient(prediction, noised, **mine)
                same(loss, got.detach())
                same(at_once, prediction.grad)


def check_other_losses(rank):
    """A learned weight, float64, half precision, uint8 images, tokens, a process that has no fast call; nothing masked,
    everything masked."""
    flow = fastdiff.RectifiedFlow()
    objective = fastdiff.Objective(flow, "flow")
    x0, n, m, *_ = data()
    t = torch.rand(5, generator=torch.Generator().manual_seed(2))
    for dtype, mask in itertools.product(
        (torch.float64, torch.bfloat16, torch.float16), (None, torch.ones(5), torch.zeros(5))
    ):
        weight = (1 - t).double().requires_grad_()
        prediction = m.to(dtype).requires_grad_()
        whole = objective.noise(x0.to(dtype), t, n.to(dtype))
        how = {"mask": mask, "mask_normalization": "global"}
        if mask is not None and not mask.any():
            want = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            prediction.grad, weight.grad = torch.zeros_like(prediction), torch.zeros_like(weight)
        else:
            want = objective.loss(prediction, whole, weight=weight, **how)
            want.backward()
        for part, start, sizes in parts(rank, averaged=False):
            mine, own = cut(prediction.detach(), start, sizes).clone().requires_grad_(), weight.detach().clone()
            own.requires_grad_()
            noised = objective.noise(*(cut(of, start, sizes) for of in (whole.x0, t, whole.noise)), part=part)
            local = {"mask": cut(mask, start, sizes), "mask_normalization": "global"}
            got = objective.loss(mine, noised, weight=cut(own, start, sizes), **local)
            close(got.detach(), want.detach(), max(1.0, float(want)), (dtype, start))
            got.backward()
            scale = float(prediction.grad.abs().max()) * (1e6 * torch.finfo(dtype).eps if dtype != torch.float64 else 1)
            close(mine.grad, cut(prediction.grad, start, sizes), scale + 1e-30, (dtype, start))
            dist.all_reduce(own.grad, group=part.group)  # as every parameter's
            close(own.grad, weight.grad, float(weight.grad.abs().max()) + 1e-30, ("weight", start))
    images = (x0 * 60 + 127).clamp(0, 255).to(torch.uint8)
    whole = objective.noise(images, seed=1, dtype=torch.float32)
    want = objective.loss(m, whole)
    for part, start, sizes in parts(rank):
        noised = objective.noise(cut(images, start, sizes), seed=1, dtype=torch.float32, part=part)
        same(noised.x_t, cut(whole.x_t, start, sizes))
        close(objective.loss(cut(m, start, sizes), noised), want, float(want), "images")


def check_tokens(rank):
    """Packed tokens of images of which each rank has some rows, cut between patches."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", input_perturbation=0.1)
    tokens = fastdiff.Tokens(2)
    x0 = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(3))
    whole = objective.noise(x0, seed=4, tokens=tokens)
    m = torch.randn(whole.x_t.shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = torch.rand(3, 1, 8, 6, generator=torch.Generator().manual_seed(5)) > 0.4
    want = objective.loss(m, whole, mask, mask_normalization="row")
    want.backward()
    of_rank = m.detach().reshape(3, 4, 3, -1)
    group, two = dist.group.WORLD, slice(2 * rank, 2 * rank + 2)
    part = Part(x0.shape, (0, 0, 2 * rank, 0), group, averaged=False)
    noised = objective.noise(x0[:, :, two], seed=4, tokens=tokens, part=part)
    same(noised.x_t, whole.x_t.reshape(3, 4, 3, -1)[:, rank])
    mine = of_rank[:, rank].clone().requires_grad_()
    got = objective.loss(mine, noised, mask[:, :, two], mask_normalization="row")
    close(got.detach(), want.detach(), float(want), "tokens")
    got.backward()
    close(mine.grad, m.grad.reshape(3, 4, 3, -1)[:, rank], float(m.grad.abs().max()), "tokens")
    uneven = objective.noise(x0[:, :, two], seed=4, tokens=tokens, part=Part(x0.shape, (0, 0, 1, 0), group))
    try:
        objective.loss(mine, uneven)
    except ValueError as error:
        assert "cuts through the 2 x 2 patches" in str(error)
    else:
        raise AssertionError("a part that cuts patches in two is refused")


def check_meshes(rank):
    """Parts of a mesh's placements, as ``torch.distributed.tensor`` cuts; copies count once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0, _, m, *_ = data()
    whole = objective.noise(x0, seed=6)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(6)) > 0.5
    prediction = m.clone().requires_grad_()
    want = objective.loss(prediction, whole, mask, mask_normalization="row")
    want.backward()
    for placements in ((Shard(0), Replicate()), (Replicate(), Shard(2)), (Shard(0), Shard(0)), (Shard(0), Shard(2)),
                       (Shard(3), Shard(2)), (Replicate(), Replicate()), (Shard(-1), Replicate())):  # fmt: skip
        distributed = distribute_tensor(x0, mesh, placements)
        for averaged in (True, False):
            part = Part.of(distributed, averaged=averaged)
            start, sizes = part.start, distributed.to_local().shape
            noised = objective.noise(distributed.to_local(), seed=6, part=part)
            same(noised.x_t, cut(whole.x_t, start, sizes))
            mine = distribute_tensor(m, mesh, placements).to_local().clone().requires_grad_()
            got = objective.loss(mine, noised, cut(mask, start, sizes), mask_normalization="row")
            close(got.detach(), want.detach(), float(want), placements)
            got.backward()
            factor = len({sharded for sharded in part_starts(part)}) if averaged else 1
            close(
                mine.grad / factor, cut(prediction.grad, start, sizes), float(prediction.grad.abs().max()), placements
            )
    for call, message in (
        (lambda: objective.noise(distribute_tensor(x0, mesh, [Shard(0), Replicate()])), "x0 is a DTensor"),
        (lambda: objective.loss(distribute_tensor(m, mesh, [Shard(0), Replicate()]), whole), "prediction is a DTensor"),
        (lambda: objective.loss(m, whole, distribute_tensor(mask, mesh, [Shard(0)] * 2)), "mask is a DTensor"),
        (lambda: objective.noise(x0, distribute_tensor(whole.t, mesh, [Shard(0)] * 2)), "t is a DTensor"),
        (lambda: fastdiff.ops.convert(distribute_tensor(m, mesh, [Shard(0)] * 2), m, 1.0, 1.0), "is a DTensor"),
    ):  # fmt: skip
        try:
            call()
        except TypeError as error:
            assert message in str(error) and ".to_local()" in str(error), error
        else:
            raise AssertionError(message)
    assert isinstance(distributed, DTensor)


def part_starts(part):
    """Where the slices of a part's ranks begin."""
    every = [None] * part.size
    dist.all_gather_object(every, part.start, group=part.group)
    return every


def check_ddp(rank):
    """Parameters after a step of DistributedDataParallel on uneven batches: those of one process."""
    from torch.nn.parallel import DistributedDataParallel

    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0 = data()[0]
    mask = torch.rand(5, 1, 5, 6, generator=torch.Generator().manual_seed(7)) > 0.5

    def network():
        torch.manual_seed(8)
        return torch.nn.Conv2d(4, 4, 3, padding=1)

    for normalization in ("none", "row", "global"):
        single = network()
        noised = objective.noise(x0, seed=9)
        objective.loss(single(noised.x_t), noised, mask, mask_normalization=normalization).backward()
        for ranks in (2, 3, 4):
            group = group_of(ranks)
            if rank >= ranks:
                continue
            sizes = UNEVEN[ranks]
            here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            model = DistributedDataParallel(network(), process_group=group)
            for given in (sizes, None):
                model.zero_grad()
                part = Part.batches(x0[here], given, group=group)
                noised = objective.noise(x0[here], seed=9, part=part)
                loss = objective.loss(model(noised.x_t), noised, mask[here], mask_normalization=normalization)
                loss.backward()
                for a, b in zip(model.parameters(), single.parameters()):
                    close(a.grad, b.grad, float(b.grad.abs().max()), (normalization, ranks))


def check_one_all_reduce(rank):
    """Forward: one, of as few numbers as there can be. Backward: none; and the gradient that was stored is used."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0, _, m, *_ = data()
    group, found, original = group_of(4), [], dist.all_reduce

    def counted(tensor, *arguments, **how):
        found.append(tensor.numel())
        return original(tensor, *arguments, **how)

    start, sizes = slices(4, (0,))[rank]
    part = Part(SHAPE, start, group, split=(0,))
    noised = objective.noise(cut(x0, start, sizes), seed=1, part=part)
    mask = torch.ones(sizes[0])
    dist.all_reduce = counted
    try:
        for how, numbers in (
            ({}, [1]), ({"reduction": "sum"}, [1]), ({"reduction": "none"}, []),
            ({"reduction": "elements"}, []),
            *(({"mask": mask, "mask_normalization": name}, [2]) for name in ("row", "sample", "global")),
            ({"mask": mask}, [1]), ({"mask": mask, "mask_normalization": "row", "reduction": "none"}, []),
        ):  # fmt: skip
            found.clear()
            prediction = cut(m, start, sizes).clone().requires_grad_()
            loss = objective.loss(prediction, noised, **how)
            assert found == numbers, (how, found)
            loss.sum().backward()
            assert found == numbers, (how, found)
        if not native.backend.unavailable_because:
            passes, launch = [], native.loss.launch
            native.loss.launch = lambda *a, **b: passes.append(b) or launch(*a, **b)
            try:
                objective.loss(cut(m, start, sizes).clone().requires_grad_(), noised).backward()
            finally:
                native.loss.launch = launch
            assert len(passes) == 1, passes
    finally:
        dist.all_reduce = original


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
