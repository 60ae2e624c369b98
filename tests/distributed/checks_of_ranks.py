"""What ranks draw that are told nothing, what they are told of mistakes, and how trainers are put together."""

import itertools

import torch
import torch.distributed as dist
from checks_of_parts import close, group_of, same

import fastdiff
from fastdiff.distributed import Part, data_parallel
from fastdiff.philox import draw_seed

OBJECTIVE = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
X0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
MOMENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def gathered(value, group=None):
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def raises(kind, message, call):
    try:
        call()
    except kind as error:
        assert message in str(error), error
        return str(error)
    raise AssertionError(f"no {kind.__name__}: {message}")


def draws(**how):
    """What each public call draws, as lists of numbers."""
    noised, model = OBJECTIVE.noise(X0, **how), lambda x, t: 0 * x
    latents = fastdiff.autoencoder.noise_latents(OBJECTIVE, MOMENTS, **how)
    perturbed = fastdiff.Objective(OBJECTIVE.process, "flow", input_perturbation=0.1)
    of_two = fastdiff.autoencoder.noise_latents(perturbed, MOMENTS, **how)
    made = {
        "t": noised.t, "noise": noised.noise, "perturbed": perturbed.noise(X0, **how).x_t,
        "sample": fastdiff.sample(model, X0.shape, OBJECTIVE, "flow_euler", 2, progress=False, **how),
        "pyramid": fastdiff.pyramid_noise(X0, **how), "latents": fastdiff.autoencoder.latents(MOMENTS, **how),
        "noise_latents": latents.x_t, "latents of two": torch.cat([of_two.x0, of_two.x_t]),
        "dropped": fastdiff.drop_condition(torch.ones(64), 0.5, **{k: v for k, v in how.items() if k != "ids"})[0],
    }  # fmt: skip
    how.pop("generator", None)
    network = torch.nn.Conv2d(2, 2, 3, padding=1, bias=False)
    torch.nn.init.constant_(network.weight, 0.1)
    made["log_likelihood"] = fastdiff.log_likelihood(
        lambda x, t: network(x), X0, OBJECTIVE, steps=3, solver="heun", **how
    ).detach()
    return {name: value.tolist() for name, value in made.items()}


def check_ranks_that_say_nothing(rank):
    """They draw different noise, though their generators have one seed; as if counted from the rank times 2^40."""
    torch.manual_seed(0)
    own = draws()
    for name in own:
        every = [of[name] for of in gathered(own)]
        assert all(a != b for k, a in enumerate(every) for b in every[:k]), name
    torch.manual_seed(0)
    seed = draw_seed(None, X0.device)
    same(OBJECTIVE.noise(X0, seed=seed, sample_offset=rank * 2**40).x_t, torch.tensor(OBJECTIVE_X_T(0)))
    for how in ({"seed": 1}, {"sample_offset": 0}, {"ids": torch.tensor([3, 1, 2])}):
        torch.manual_seed(0)
        every = gathered(draws(**how))
        for name in own:
            if not (name == "dropped" and "ids" in how):
                assert all(of[name] == every[0][name] for of in every), (name, how)
    every = gathered(draws(generator=torch.Generator().manual_seed(0)))
    assert all(of["noise"] != every[0]["noise"] for of in every[1:])


def OBJECTIVE_X_T(seed):
    torch.manual_seed(seed)
    return OBJECTIVE.noise(X0).x_t.tolist()


def check_ranks_that_hold_the_same(rank):
    """``data_parallel`` says which ranks differ: by mesh, by group, by number."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pairs, two = [dist.new_group([0, 2]), dist.new_group([1, 3])], group_of(2)
    try:
        for ranks, expected in (
            (mesh["dp"], [0, 0, 1, 1]), (mesh, [0, 1, 2, 3]), (pairs[rank % 2], [0, 0, 1, 1]),
            ((rank % 2, 2), [0, 1, 0, 1]),
        ):  # fmt: skip
            data_parallel(ranks)
            torch.manual_seed(0)
            every = gathered(OBJECTIVE.noise(X0).x_t.tolist())
            for a, b in itertools.combinations(range(4), 2):
                assert (every[a] == every[b]) == (expected[a] == expected[b]), (expected, a, b)
        # Parts of two wholes: of each pair one, other noise in each.
        data_parallel(None)
        torch.manual_seed(0)
        group = mesh["tp"].get_group()
        part = Part((3, 2, 8, 4), (0, 0, 4 * (rank % 2), 0), group)
        every = gathered((OBJECTIVE.noise(X0, part=part).x_t.tolist(), OBJECTIVE.noise(X0, part=part).t.tolist()))
        assert every[0][0] != every[2][0] and every[1][0] != every[3][0] and every[0][0] != every[1][0]
        assert every[0][1] == every[1][1] != every[2][1] == every[3][1]
        raises(ValueError, "got 4 of 4", lambda: data_parallel((4, 4)))
        raises(TypeError, "a process group, a DeviceMesh", lambda: data_parallel("dp"))
        if rank > 1:
            raises(ValueError, "must hold this process", lambda: data_parallel(two))
            raises(ValueError, "not in the group", lambda: Part((4, 3), (0, 0), two))
    finally:
        data_parallel(None)


def check_mistakes(rank):
    """With ``debug`` every rank says what each rank was given; without it, nothing is exchanged but what is needed."""
    part = Part((12, 2, 4, 4), (3 * rank, 0, 0, 0), split=(0,))
    other = rank == 2
    t = torch.rand(3)

    def loss(dtype=torch.float32, mask=None, more=False, **how):
        with fastdiff.debug(False):
            noised = OBJECTIVE.noise(X0, t, X0, part=part)
        return OBJECTIVE.loss((X0[:, :1] if more else X0).to(dtype), noised, mask, **how)

    def wrong(**of):
        return Part(**({"shape": part.shape, "start": part.start, "split": (0,)} | (of if other else {})))

    with fastdiff.debug(True):
        for what, call in {
            "shape of the whole": lambda: OBJECTIVE.noise(X0, seed=1, part=wrong(shape=(13, 2, 4, 4))),
            "seed: rank 0 has 1, rank 1 has 1, rank 2 has 2": lambda: OBJECTIVE.noise(X0, seed=1 + other, part=part),
            "averaged: rank 0 has True": lambda: OBJECTIVE.noise(X0, seed=1, part=wrong(averaged=False)),
            "split": lambda: OBJECTIVE.noise(X0, seed=1, part=wrong(split=None)),
            "dtype: rank 0 has torch.float32": lambda: OBJECTIVE.noise(X0.double() if other else X0, seed=1, part=part),
            "ids: rank 0 has False": lambda: OBJECTIVE.noise(
                X0, seed=1, ids=torch.arange(3) if other else None, part=part
            ),
            "do not cover the whole (12, 2, 4, 4) once": lambda: OBJECTIVE.noise(
                X0, seed=1, part=wrong(start=(0, 0, 0, 0))
            ),
            "do not cover": lambda: OBJECTIVE.noise(X0[: 2 if other else 3], seed=1, part=part),
            "reduction: rank 0 has 'mean', rank 1 has 'mean', rank 2 has 'sum'": lambda: loss(
                reduction="sum" if other else "mean"
            ),
            "mask_normalization": lambda: loss(mask=torch.ones(3), mask_normalization="row" if other else "global"),
            "mask: rank 0 has False": lambda: loss(mask=torch.ones(3) if other else None, reduction="sum"),
            "prediction shaped as x_t": lambda: loss(more=other),
            "objective.loss (ranks of the group). dtype": lambda: loss(torch.bfloat16 if other else torch.float32),
        }.items():
            message = raises(RuntimeError, what, call)
            assert "rank 2" in message and "rank 3" in message
        OBJECTIVE.noise(X0, seed=1, part=part)
        loss()
    original = dist.all_gather_object
    dist.all_gather_object = None
    try:
        loss()
    finally:
        dist.all_gather_object = original


def check_wrong_parts(rank):
    for message, kind, call in (
        ("with something in it", ValueError, lambda: Part((0, 3), (0, 0))),
        ("start have as many numbers", ValueError, lambda: Part((4, 3), (0,))),
        ("outside of the whole", ValueError, lambda: Part((4, 3), (5, 0))),
        ("a whole number", TypeError, lambda: Part((4.5, 3), (0, 0))),
        ("split must name dimensions", ValueError, lambda: Part((4, 3), (0, 0), split=(2,))),
        ("copy must be one of", ValueError, lambda: Part((4, 3), (0, 0), copy=1)),
        ("no slice of the whole", ValueError, lambda: OBJECTIVE.noise(X0, part=Part((3, 2, 4, 4), (1, 0, 0, 0)))),
        ("no slice of the whole", ValueError, lambda: OBJECTIVE.noise(X0, part=Part((3, 2, 4), (0, 0, 0)))),
        ("must be a fastdiff.distributed.Part", TypeError, lambda: OBJECTIVE.noise(X0, part=3)),
        ("must be a DTensor", TypeError, lambda: Part.of(X0)),
        ("sizes must be those of 4 ranks", ValueError, lambda: Part.batches(X0, [3, 3, 3])),
        ("sizes must be those of 4 ranks", ValueError, lambda: Part.batches(X0, [1, 2, 1, 2])),
        ("at most 2^42", ValueError, lambda: OBJECTIVE.noise(X0, part=Part((3, 2**20, 2**20, 8), (0, 0, 0, 0)))),
        ("a generator or a seed", ValueError,
         lambda: OBJECTIVE.noise(X0, seed=1, generator=torch.Generator(), part=Part(X0.shape, (0,) * 4))),
        ("ids and sample_offset", ValueError,
         lambda: OBJECTIVE.noise(X0, ids=torch.arange(3), sample_offset=3, seed=1, part=Part(X0.shape, (0,) * 4))),
        ("Stratified draws t for a whole batch", ValueError,
         lambda: fastdiff.Objective(OBJECTIVE.process, "flow", timesteps="stratified").noise(
             X0, ids=torch.arange(3), seed=1, part=Part(X0.shape, (0,) * 4))),
        ("divides by nothing", ValueError,
         lambda: OBJECTIVE.loss(X0, OBJECTIVE.noise(X0, seed=1, part=Part(X0.shape, (0,) * 4)), torch.ones(3), "sum",
                                mask_normalization="row")),
        ("could be one time for each, or one for all", ValueError,
         lambda: OBJECTIVE.loss(X0[:, :1], OBJECTIVE.noise(X0[:, :1], torch.rand(3, 1, 4, 1), X0[:, :1],
                                part=Part(X0.shape, (0,) * 4)), reduction="none")),
    ):  # fmt: skip
        raises(kind, message, call)


def check_a_run_that_goes_on_with_other_ranks(rank):
    """Four ranks, then two: by the samples' ids and one seed, each sample keeps its t and its noise, and the loss is
    that of one process."""
    data = torch.randn(24, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    found = {}
    for step, ranks in enumerate((4, 4, 2, 2)):
        if rank >= ranks:
            continue
        batch = order[6 * step : 6 * step + 6]
        sizes = [len(of) for of in batch.tensor_split(ranks)]
        ids = batch.tensor_split(ranks)[rank]
        part = Part.batches(data[ids], sizes, group=group_of(ranks))
        noised = OBJECTIVE.noise(data[ids], seed=17, ids=ids, part=part)
        whole = OBJECTIVE.noise(data[batch], seed=17, ids=batch)
        got, want = OBJECTIVE.loss(0.5 * noised.x_t, noised), OBJECTIVE.loss(0.5 * whole.x_t, whole)
        close(got, want, float(want), step)
        found |= {int(i): (noised.t[k], noised.noise[k]) for k, i in enumerate(ids)}
    everything = OBJECTIVE.noise(data, seed=17)
    assert found
    for i, (t, noise) in found.items():
        same(t, everything.t[i])
        same(noise, everything.noise[i])


def check_pipeline(rank):
    """Noised on the first stage, the loss on the last."""
    tokens, x0 = fastdiff.Tokens(2), X0
    for k, (how, others) in enumerate((
        ({"seed": 5}, {}), ({"seed": 5, "keep_noise": False, "sample_offset": 2**41}, {}),
        ({"seed": torch.tensor([7]), "ids": torch.tensor([5, 2**40, -3]), "keep_noise": False}, {}),
        ({"seed": 5, "tokens": tokens}, {"tokens": tokens}), ({"with_target": True}, {}),
        ({"keep_noise": False, "rng": "fast"}, {}),
        ({"seed": 5, "part": Part(X0.shape, (0,) * 4, group_of(1) if rank == 0 else None)}, {}),
    )):  # fmt: skip
        if rank == 0:
            noised = OBJECTIVE.noise(x0, **how)
            prediction = 0.3 * noised.x_t
            sent = noised.tensors()
            assert all(type(of) is torch.Tensor for of in sent.values())
            described = [
                {name: (of.shape, of.dtype) for name, of in sent.items()},
                float(OBJECTIVE.loss(prediction, noised)),
            ]
            dist.send_object_list(described, 3)
            for of in (*sent.values(), prediction):
                dist.send(of.contiguous(), 3)
        elif rank == 3:
            described = [None, None]
            dist.recv_object_list(described, 0)
            received = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described[0].items()}
            for of in received.values():
                dist.recv(of, 0)
            prediction = torch.empty_like(received["x_t"])
            dist.recv(prediction, 0)
            noised = fastdiff.Noised.from_tensors(OBJECTIVE, received, **others)
            assert float(OBJECTIVE.loss(prediction, noised)) == described[1], k
            for name in ("x_t", "t", "noise", "target", "weight"):
                assert getattr(noised, name).isfinite().all()
    offset = fastdiff.Objective(OBJECTIVE.process, "flow", noise_offset=0.3)
    noised = offset.noise(X0, seed=1, keep_noise=False)
    again = fastdiff.Noised.from_tensors(offset, noised.tensors())
    same(again.noise, noised.noise)
    raises(ValueError, "no tensors of a Noised", lambda: fastdiff.Noised.from_tensors(OBJECTIVE, {"x0": X0}))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
