"""fastdiff inside trainers: Accelerate, Lightning, GradScaler, DDP, FSDP2, torch.compile, checkpoints; all on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.integrations.lightning import DiffusionTraining, stepped_seed
from fastdiff.integrations.losses_per_timestep import TimestepLosses

# Some processes abort while they leave a gloo group, after all work is done: 4 of 24 runs of plain PyTorch 2.13 without
# fastdiff did on a busy machine. These leave without tidying up, so that one that does not end with 0 has failed.
LEAVE = "import os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    if not (EXAMPLES / f"{name}.py").exists():
        pytest.skip("the examples are not part of an installed package")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # by this name compiled code and pickles find it
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------------- score SDE


@pytest.mark.parametrize("arguments", [["--sde", "vp"], ["--sde", "sub-vp", "--weighting", "importance"]], ids=" ".join)
def test_the_score_sde_learns_the_density(arguments):
    """A Gaussian of the data's variance would have 3.61 nats; no model has less than the entropy, but for the chance of
    500 points: their mean of log p - log q has a deviation below 0.03."""
    found = example("score_sde").main(["--quick", *arguments])
    assert found["last loss"] < 0.97 * found["first loss"]
    assert found["entropy"] - 0.1 < found["nll"] < found["entropy"] + 0.4
    assert found["samples"] < found["entropy"] + 0.8


# ------------------------------------------------------------------------------------------------- diffusion forcing


def test_the_example_of_videos():
    found = example("video").main(["--steps", "60", "--draw", "8", "--levels", "4"])
    assert found["last loss"] < 0.8 * found["first loss"]
    assert 0 < found["pyramid"] < 6 and 0 < found["full_sequence"] < 6


# ------------------------------------------------------------------------------------------------------------ hybrid


def test_a_learned_variance_has_fewer_bits_in_few_steps():
    """Also after so short a training: the variance of the true Gaussian is far too small for 25 steps."""
    pytest.importorskip("sklearn")
    found = example("hybrid").main(["--quick"])
    assert 3 < found["hybrid learned_range, 25 steps"] < 0.2 * found["simple fixed_small, 25 steps"]
    assert all(3 < found[name] < 12 for name in ("hybrid learned_range", "simple fixed_small", "simple fixed_large"))


# ---------------------------------------------------------------------------------------------------------- features


def test_terms_on_the_x0_estimate_make_it_sharper():
    """The mean of all digits that it could be is blurred: 0.37 of a real digit's sharpness, and 0.60 with the terms."""
    pytest.importorskip("sklearn")
    found = example("features").main(["--quick"])
    plain, both = (found[f"{name}: sharpness"] for name in ("the squared error", "with the terms"))
    assert plain < 0.45 and plain * 1.25 < both < 1
    assert found["last perceptual"] < 0.8 * found["first perceptual"]
    assert found["with the terms: squared error"] < 1.2 * found["the squared error: squared error"]
    assert all(found[f"last {name}"] > 0 for name in ("adversarial", "discriminator", "r1"))
    assert "first adversarial" not in found  # it begins later


# -------------------------------------------------------------------------------------------------------------- flow


def test_a_flow_makes_digits_in_four_steps():
    pytest.importorskip("sklearn")
    found = example("flow").main(["--quick"])
    assert found["last loss"] < 0.8 * found["first loss"]
    assert found["flow_euler, 4"] > 0.95 and found["flow_heun, 2"] > 0.95


# ------------------------------------------------------------------------------------------------ classifier guidance


def test_a_classifier_leads_to_the_digit_that_is_wanted():
    """Without it one in ten is by chance: four standard deviations of 500 are 5.4%."""
    pytest.importorskip("sklearn")
    found = example("classifier_guidance").main(["--quick"])
    assert 0.046 < found["without"] < 0.154 and found["with"] > 0.7


# ----------------------------------------------------------------------------------------------------------------- VAE


def test_an_autoencoder_of_digits_and_a_flow_in_its_latents():
    """A mean digit has an error of 0.30, the variance starts at 1, and digits are 0.11 from their nearest ones."""
    pytest.importorskip("sklearn")
    found = example("vae").main(["--quick"])
    assert found["error"] < 0.18 and 0.3 < found["variance"] < 0.8
    assert 2 < found["divergence"] < 10 and found["nearest"] < 0.15


# ---------------------------------------------------------------------------------------------------------- MeanFlow


def test_meanflow_makes_digits_in_one_step():
    """Without du/dt in the target the distance is 0.84 and with its sign turned 3.6, though the first are recognised as
    well: they are the mean images of the digits."""
    pytest.importorskip("sklearn")
    found = example("meanflow").main(["--quick"])
    assert found["last error"] < 0.7 * found["first error"]
    assert found["recognised"] > 0.95
    assert found["distance"] < 0.35 and found["distance of means"] > 1.5


# -------------------------------------------------------------------------------------------------------- Accelerate


@pytest.fixture
def accelerate_train():
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from accelerate.state import AcceleratorState, PartialState

    module = example("accelerate_train")

    def run(*arguments):
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        return module.main(["--cpu", "--batch", "32", *map(str, arguments)])

    yield run
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def test_accelerate_resumes_to_the_bit(accelerate_train, tmp_path):
    whole = accelerate_train("--steps", 6)
    first = accelerate_train("--steps", 3, "--checkpoint", tmp_path)
    rest = accelerate_train("--steps", 6, "--checkpoint", tmp_path, "--resume")
    assert len(whole) == 6 and first + rest == whole


def test_accelerate_accumulation_changes_only_roundings(accelerate_train):
    """The noise of a sample depends on its place in the whole batch. Losses after 5 optimizer steps of Adam: 1e-4."""
    np.testing.assert_allclose(
        accelerate_train("--steps", 5, "--accumulate", 4), accelerate_train("--steps", 5), rtol=1e-4
    )


def test_accelerate_mixed_precision_and_learning(accelerate_train):
    plain, mixed = accelerate_train("--steps", 60), accelerate_train("--steps", 60, "--mixed-precision", "bf16")
    assert np.mean(plain[-10:]) < 0.8 * np.mean(plain[:10])
    # bfloat16 activations have 8 bits: the runs stay within a few percent of each other.
    np.testing.assert_allclose(np.mean(mixed[-10:]), np.mean(plain[-10:]), rtol=0.05)


def test_accelerate_compiled(accelerate_train):
    """Noising, network and loss traced by torch.compile. 1e-5: the same numbers but for the order of sums."""
    torch._dynamo.reset()
    np.testing.assert_allclose(
        accelerate_train("--steps", 3, "--compile", "aot_eager"), accelerate_train("--steps", 3), rtol=1e-5
    )


def test_accelerate_in_two_processes(accelerate_train, tmp_path):
    """DDP over gloo: two processes with half of the batch each learn what one learns from all of it."""
    alone = accelerate_train("--steps", 3)
    script = tmp_path / "train.py"
    script.write_text(
        "import accelerate, accelerate_train\n"
        "accelerate.Accelerator.end_training = lambda self: None  # which leaves the group\n"
        f"accelerate_train.main()\n{LEAVE}\n"
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(script), "--cpu", "--batch", "32", "--steps", "3", "--losses", str(tmp_path / "losses.json")),
    ]
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(json.loads((tmp_path / "losses.json").read_text()), alone, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- uncertainty


def test_the_uncertainty_that_the_example_learns():
    """u nears ln of the error of its noise level, which lies between -0.1 and -0.9. u moves with the noise of training:
    0.25 is a third of that range."""
    pytest.importorskip("sklearn")
    found = example("edm2_uncertainty").main(["--quick"])
    sigma, error, u = np.array(found).T
    assert np.ptp(error) > 0.4 and sigma[0] < 0.05 and sigma[-1] > 5
    np.testing.assert_allclose(u, error, rtol=0, atol=0.25)
    assert np.corrcoef(u, error)[0, 1] > 0.8


# --------------------------------------------------------------------------------------------------------- Lightning


def lightning_train(folder, *arguments):
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    module = example("lightning_train")
    return module.main(["--accelerator", "cpu", "--folder", str(folder), *map(str, arguments)])


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_to_the_bit_and_logs_by_timestep(tmp_path):
    # An epoch is 5 batches of 359: Lightning begins an epoch anew where its loader does not keep its place.
    epochs = ("--batch", 359, "--every", 5)
    _, whole = lightning_train(tmp_path / "whole", "--steps", 10, *epochs)
    _, _ = lightning_train(tmp_path / "parts", "--steps", 5, *epochs)
    checkpoint = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=False)
    assert checkpoint["fastdiff_batches_seen"] == 5
    trainer, parts = lightning_train(
        tmp_path / "parts", "--steps", 10, *epochs, "--resume", tmp_path / "parts" / "last.ckpt"
    )
    assert trainer.global_step == 10
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(a, b), name
    header = next((tmp_path / "whole").glob("**/metrics.csv")).read_text().splitlines()[0]
    assert "train/loss" in header and "train/loss/t_0.00-0.20" in header and "train/loss/t_0.80-1.00" in header


@pytest.mark.filterwarnings("ignore")
def test_lightning_mixed_precision_and_accumulation(tmp_path):
    trainer, model = lightning_train(tmp_path, "--steps", 4, "--precision", "bf16-mixed", "--accumulate", 2)
    assert trainer.global_step == 4 and model._batches_seen == 8
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


class Bare(DiffusionTraining, nn.Module):
    """The mixin without Lightning: what it asks of its module is forward and log."""

    def __init__(self, objective=None):
        super().__init__()
        if objective is not None:
            self.objective = objective
        self.logged, self.weight = {}, nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, *others):
        return self.weight * x

    def log(self, name, value, **options):
        self.logged[name] = float(value.detach())


def test_mixin_without_lightning():
    model = Bare(fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"))
    x0 = torch.randn(4, 3, 8, 8)
    model.training_step(x0, 0).backward()
    assert model.weight.grad is not None and model.logged["train/loss"] > 0
    a, b, c = (model.validation_step((x0, "label"), index).item() for index in (0, 0, 1))
    assert a == b != c, "validation has one seed a batch"
    with pytest.raises(TypeError, match="self.objective"):
        Bare().training_step(x0, 0)


def splitmix(*values):
    """Steele et al. 2014: the finalizer of a state that grows by the golden ratio, and here by a value, each time."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def rows_of(seed, samples=64):
    """(t, loss) of x0 = 0 and an output of half of x_t: (sigma / 2 - 1)^2 of the mean square of the noise."""
    n = oracle.normal(seed, (samples, 3)).astype(np.float64)
    t = np.floor(1000 * oracle.uniform(seed, samples, stream=3)).astype(int)
    sigma = np.sqrt(1 - oracle.alpha_bar(oracle.betas_linear(1000))[t]).astype(np.float64)
    return t, (sigma / 2 - 1) ** 2 * (n**2).mean(1)


@pytest.mark.parametrize("seed", [5, 6])
def test_noise_seed_of_the_mixin(seed):
    """The k-th batch has the noise of (seed, k); the batches of a validation that of (seed, -1 - index)."""
    model = Bare(fastdiff.Objective(fastdiff.VariancePreserving()))
    model.noise_seed = seed
    x0 = torch.zeros(64, 3)
    for k in range(3):
        expected = rows_of(splitmix(seed, k))[1].mean()
        assert model.training_step(x0, 17).item() == pytest.approx(expected, rel=1e-6)
    assert model.validation_step(x0, 2).item() == pytest.approx(rows_of(splitmix(seed, -3))[1].mean(), rel=1e-6)
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    assert checkpoint == {"fastdiff_batches_seen": 3}


@pytest.mark.parametrize("buckets", [2, 4])
def test_per_timestep_of_the_mixin(buckets):
    """Every second step, the means of all that was seen since in equal intervals of t."""
    model, logged = Bare(fastdiff.Objective(fastdiff.VariancePreserving())), []
    model.noise_seed, model.per_timestep = 5, buckets
    logger = types.SimpleNamespace(log_metrics=lambda values, step: logged.append((step, values)))
    model.trainer = types.SimpleNamespace(log_every_n_steps=2, logger=logger)
    for step in range(3):
        model.global_step = step
        model.training_step(torch.zeros(64, 3), step)
    t, losses = (np.concatenate(pair) for pair in zip(*(rows_of(splitmix(5, k)) for k in range(2))))
    edges = np.arange(buckets + 1) / buckets
    expected = {
        f"train/loss/t_{low:.2f}-{high:.2f}": losses[(t >= 1000 * low) & (t < 1000 * high)].mean()
        for low, high in zip(edges, edges[1:])
    }
    assert logged == [(1, pytest.approx(expected, rel=1e-6))]


def test_ranks_share_a_batch():
    model = Bare(fastdiff.Objective(fastdiff.VariancePreserving()))
    x0 = torch.randn(8, 3, 4, 4)
    whole = model.diffusion_loss(x0, seed=3, reduction="none")
    model.global_rank = 1
    torch.testing.assert_close(model.diffusion_loss(x0[4:], seed=3, reduction="none"), whole[4:], rtol=0, atol=0)


def test_stepped_seeds_are_splitmix64():
    """The first five numbers of splitmix64 for the seed 1234567, as they are published (Rosetta Code)."""
    published = 6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
    for k, number in enumerate(published):
        state = 1234567 + k * 0x9E3779B97F4A7C15  # the second round begins where the first ended, plus the step
        assert stepped_seed(1234567, state - published[0]) == (number if number < 2**63 else number - 2**64)


def test_stepped_seeds():
    seeds = {stepped_seed(seed, step) for seed in range(50) for step in range(-50, 50)}
    assert len(seeds) == 5000 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    bits = np.array([[(seed >> k) & 1 for k in range(64)] for seed in seeds])
    # 5000 fair coins: within 5 standard deviations, 5 * 0.5 / sqrt(5000).
    assert abs(bits.mean(0) - 0.5).max() < 0.036


# ----------------------------------------------------------------------------------------- plain PyTorch: GradScaler


def test_grad_scaler_and_float16():
    """float16 predictions under a GradScaler: gradients of the network equal the float32 ones to float16's rounding,
    and a step whose gradients overflow is skipped."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
    x0 = torch.randn(8, 3, 64, 64)
    noised = objective.noise(x0, seed=1)
    objective.loss(network(noised.x_t), noised).backward()
    expected = network.weight.grad.clone()
    network.zero_grad()

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with torch.autocast("cpu", torch.float16):
        prediction = network(noised.x_t)
    assert prediction.dtype == torch.float16
    loss = objective.loss(prediction, noised)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    # Sums of 32768 products of numbers with 11 bits each: 2^-10 of the largest.
    assert float((network.weight.grad - expected).abs().max()) <= 2.0**-10 * float(expected.abs().max())
    scaler.step(optimizer)
    scaler.update()

    before = network.weight.detach().clone()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = objective.loss(network(noised.x_t), noised)
    scaler.scale(loss * 1e12).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.weight, before) and scaler.get_scale() < 2.0**14


# --------------------------------------------------------------------------------------------------- DDP and FSDP2


def two_ranks(rank, folder):
    """Gradients of DDP and FSDP2 over halves of a batch, against those of the whole batch in one process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
    x0 = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def backward(net, x0, first):
        noised = objective.noise(x0, seed=7, sample_offset=first)
        objective.loss(net(noised.x_t), noised).backward()
        return [p.grad for p in net.parameters()]

    whole = backward(network(), x0, 0)
    half = x0[4 * rank : 4 * rank + 4]
    found = {"ddp": backward(nn.parallel.DistributedDataParallel(network()), half, 4 * rank)}

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded, mesh = network(), init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    found["fsdp2"] = [gradient.full_tensor() for gradient in backward(sharded, half, 4 * rank)]
    for name, gradients in found.items():
        for a, b in zip(whole, gradients):
            # Sums of 512 products in another order.
            assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max()), name

    losses = TimestepLosses(2)
    noised = objective.noise(half, torch.tensor([100, 200, 700, 800]), seed=7)
    losses.update(noised, torch.full((4,), float(rank + 1)))
    values = losses.compute()
    assert values == {"loss/t_0.00-0.50": 1.5, "loss/t_0.50-1.00": 1.5}, values
    Path(folder, f"done{rank}").touch()
    torch.distributed.barrier()
    os._exit(0)  # see LEAVE


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_ddp_and_fsdp2(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# ---------------------------------------------------------------------------------------------- losses by timestep


def test_timestep_losses_are_means_of_intervals():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(steps=100))
    per_timestep = TimestepLosses(4, "l")
    expected: dict[int, list[float]] = {}
    for seed in range(5):
        noised = objective.noise(torch.zeros(16, 3), seed=seed)
        rows = objective.loss(torch.randn(16, 3), noised, reduction="none")
        per_timestep.update(noised, rows)
        for t, value in zip(noised.t.tolist(), rows.tolist()):
            expected.setdefault(t // 25, []).append(value)
    values = per_timestep.compute(reset=False)
    assert values == per_timestep.compute() and per_timestep.compute() == {}
    assert list(values) == ["l/t_0.00-0.25", "l/t_0.25-0.50", "l/t_0.50-0.75", "l/t_0.75-1.00"]
    np.testing.assert_allclose(list(values.values()), [np.mean(expected[k]) for k in range(4)], rtol=1e-6)


def test_timestep_losses_go_to_each_kind_of_logger():
    class TensorBoard:
        def add_scalar(self, name, value, step):
            self.seen = name, value, step

    class Wandb:
        def log(self, values, step=None):
            self.seen = values, step

    class Lightning(Wandb):
        def log_metrics(self, values, step=None):
            self.seen = values, step

    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    per_timestep = TimestepLosses(2)

    def fill():
        noised = objective.noise(torch.zeros(2, 3), torch.tensor([0.1, 1.0]), seed=0)
        per_timestep.update(noised, torch.tensor([1.0, float("nan")]))

    together = {"loss/t_0.00-0.50": 1.0}, 7
    for logger, seen in (
        (TensorBoard(), ("loss/t_0.00-0.50", 1.0, 7)), (Wandb(), together), (Lightning(), together),
    ):  # fmt: skip
        fill()
        assert per_timestep.log_to(logger, 7) == {"loss/t_0.00-0.50": 1.0}, "NaN is not counted"
        assert logger.seen == seen
    with pytest.raises(TypeError, match="add_scalar"):
        per_timestep.log_to(object(), 1)


def test_timestep_losses_wrong_use():
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    noised = objective.noise(torch.zeros(4, 3), seed=0)
    with pytest.raises(ValueError, match="reduction='none'"):
        TimestepLosses().update(noised, torch.tensor(1.0))
    with pytest.raises(ValueError, match="buckets"):
        TimestepLosses(0)
    edm = fastdiff.Objective(fastdiff.EDM(), "edm")
    noised = edm.noise(torch.zeros(4, 3), seed=0)
    with pytest.raises(ValueError, match="fraction"):
        TimestepLosses().update(noised, torch.ones(4))
    TimestepLosses().update(noised, torch.ones(4), fraction=torch.rand(4))


def test_timestep_losses_never_wait_for_the_device(monkeypatch):
    """Meta tensors have no values: whatever looked at one would raise."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    noised = objective.noise(torch.zeros(4, 3), seed=0)
    per_timestep = TimestepLosses()
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the host waited"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the host waited"))
    per_timestep.update(noised, torch.ones(4))
