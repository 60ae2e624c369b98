"""Objects with the interfaces of other libraries, written here from the papers' formulas: plain tensor expressions from
float64 tables."""

import enum
import math
import random
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def spread(rows, x):
    return rows.reshape(-1, *(1,) * (x.ndim - 1))


# -- denoising-diffusion-pytorch


class Net(nn.Module):
    """A small network with the attributes that the package asks for."""

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 1, 1, False, False

    def __init__(self, channels=1, self_condition=False, continuous=False):
        super().__init__()
        self.channels = self.out_dim = channels
        self.self_condition, self.random_or_learned_sinusoidal_cond = self_condition, continuous
        g = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(8, channels, 3, 3, generator=g) * 0.3)
        self.time = nn.Parameter(torch.randn(8, generator=g) * 0.1)
        self.last = nn.Parameter(torch.randn(channels, 8, 3, 3, generator=g) * 0.1)

    def forward(self, x, t, x_self_cond=None):
        if x_self_cond is not None:
            x = x + 0.3 * x_self_cond
        t = t.to(x.dtype) / 1000 if not t.is_floating_point() else t
        h = F.conv2d(x, self.first, padding=1) + (t[:, None] * self.time)[:, :, None, None]
        return F.conv2d(torch.tanh(h), self.last, padding=1)


class GaussianDiffusion(nn.Module):
    """DDPM, DDIM, offset noise, min-SNR and immiscible noise, as plain tensor expressions."""

    def __init__(
        self, model, *, image_size, timesteps=1000, sampling_timesteps=None, objective="pred_v",
        ddim_sampling_eta=0.0, offset_noise_strength=0.0, min_snr_loss_weight=False, min_snr_gamma=5, immiscible=False,
    ):  # fmt: skip
        super().__init__()
        self.model, self.channels, self.self_condition = model, model.channels, model.self_condition
        self.image_size, self.num_timesteps, self.objective = (image_size, image_size), timesteps, objective
        self.sampling_timesteps = sampling_timesteps or timesteps
        self.ddim_sampling_eta, self.offset_noise_strength = ddim_sampling_eta, offset_noise_strength
        self.immiscible = immiscible
        beta = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, 0)
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = beta * (1 - before) / (1 - abar)
        snr = abar / (1 - abar)
        clipped = snr.clamp(max=min_snr_gamma) if min_snr_loss_weight else snr
        buffers = {
            "betas": beta,
            "alphas_cumprod": abar,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "sqrt_recip_alphas_cumprod": abar**-0.5,
            "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
            "posterior_mean_coef1": beta * before.sqrt() / (1 - abar),
            "posterior_mean_coef2": (1 - before) * (1 - beta).sqrt() / (1 - abar),
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "loss_weight": {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}[objective],
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.float())

    @property
    def device(self):
        return self.betas.device

    def normalize(self, x):
        return 2 * x - 1

    def unnormalize(self, x):
        return (x + 1) / 2

    def noise_assignment(self, x_start, noise):
        from scipy.optimize import linear_sum_assignment

        cost = torch.cdist(x_start.flatten(1), noise.flatten(1))
        return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])

    def model_predictions(self, x, t, x_self_cond=None, clip=False):
        m = self.model(x, t, x_self_cond)
        a, s = spread(self.sqrt_alphas_cumprod[t], x), spread(self.sqrt_one_minus_alphas_cumprod[t], x)
        recip, recipm1 = (
            spread(self.sqrt_recip_alphas_cumprod[t], x),
            spread(self.sqrt_recipm1_alphas_cumprod[t], x),
        )
        x0 = {"pred_noise": recip * x - recipm1 * m, "pred_x0": m, "pred_v": a * x - s * m}[self.objective]
        x0 = x0.clamp(-1, 1) if clip else x0
        return types.SimpleNamespace(pred_x_start=x0, pred_noise=(recip * x - x0) / recipm1)

    @torch.inference_mode()
    def p_sample(self, x, t, x_self_cond=None):
        index = torch.full((len(x),), t)
        x0 = self.model_predictions(x, index, x_self_cond).pred_x_start.clamp(-1, 1)
        mean = spread(self.posterior_mean_coef1[index], x) * x0 + spread(self.posterior_mean_coef2[index], x) * x
        noise = torch.randn_like(x) if t > 0 else 0.0
        return mean + spread((0.5 * self.posterior_log_variance_clipped[index]).exp(), x) * noise, x0

    @torch.inference_mode()
    def ddim_sample(self, shape, return_all_timesteps=False):
        times = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1).int().tolist()[::-1]
        x = torch.randn(shape)
        images, x0 = [x], None
        for t, following in zip(times[:-1], times[1:]):
            condition = x0 if self.self_condition else None
            found = self.model_predictions(x, torch.full((shape[0],), t), condition, clip=True)
            x0 = found.pred_x_start
            if following < 0:
                x = x0
            else:
                a, b = self.alphas_cumprod[t], self.alphas_cumprod[following]
                sigma = self.ddim_sampling_eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
                noise = torch.randn_like(x)
                x = x0 * b.sqrt() + (1 - b - sigma**2).sqrt() * found.pred_noise + sigma * noise
            images.append(x)
        return self.unnormalize(torch.stack(images, 1) if return_all_timesteps else x)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        a, s = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        return spread(a, x_start) * x_start + spread(s, x_start) * noise

    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            noise += strength * torch.randn(x_start.shape[:2])[:, :, None, None]
        x = self.q_sample(x_start=x_start, t=t, noise=noise)
        condition = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                condition = self.model_predictions(x, t).pred_x_start
        m = self.model(x, t, condition)
        a, s = spread(self.sqrt_alphas_cumprod[t], x), spread(self.sqrt_one_minus_alphas_cumprod[t], x)
        target = {"pred_noise": noise, "pred_x0": x_start, "pred_v": a * noise - s * x_start}[self.objective]
        loss = ((m - target) ** 2).flatten(1).mean(1) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, images):
        t = torch.randint(0, self.num_timesteps, (len(images),)).long()
        return self.p_losses(self.normalize(images), t)


class ContinuousTimeGaussianDiffusion(nn.Module):
    def __init__(self, model, *, image_size, channels=3, noise_schedule="linear", min_snr_loss_weight=False):
        super().__init__()
        self.model, self.image_size, self.channels = model, image_size, channels
        self.min_snr_loss_weight, self.min_snr_gamma = min_snr_loss_weight, 5
        self.slope = nn.Parameter(torch.tensor(1.0)) if noise_schedule == "learned" else 1.0

    def log_snr(self, t):
        return -torch.log(torch.expm1(1e-4 + 10 * t**2)) * self.slope

    def q_sample(self, x_start, times, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        log_snr = self.log_snr(times)
        return spread(log_snr.sigmoid().sqrt(), x_start) * x_start + spread(
            (-log_snr).sigmoid().sqrt(), noise
        ) * noise, log_snr

    def p_losses(self, x_start, times, noise=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        x, log_snr = self.q_sample(x_start, times, noise)
        loss = ((self.model(x, log_snr) - noise) ** 2).flatten(1).mean(1)
        if self.min_snr_loss_weight:
            loss = loss * log_snr.exp().clamp(max=self.min_snr_gamma) / log_snr.exp()
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, images):
        return self.p_losses(2 * images - 1, torch.zeros(len(images)).uniform_(0, 1))


class VParamContinuousTimeGaussianDiffusion(nn.Module):
    def __init__(self, model, *, image_size, channels=3):
        super().__init__()
        self.model, self.image_size, self.channels = model, image_size, channels

    @staticmethod
    def log_snr(t):
        return -torch.log((torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** -2 - 1).clamp(min=1e-5))

    def q_sample(self, x_start, times, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        log_snr = self.log_snr(times)
        a, s = spread(log_snr.sigmoid().sqrt(), x_start), spread((-log_snr).sigmoid().sqrt(), x_start)
        return a * x_start + s * noise, log_snr, a, s

    def p_losses(self, x_start, times, noise=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        x, log_snr, a, s = self.q_sample(x_start, times, noise)
        loss = ((self.model(x, log_snr) - (a * noise - s * x_start)) ** 2).flatten(1).mean(1)
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, images):
        return self.p_losses(2 * images - 1, torch.zeros(len(images)).uniform_(0, 1))


class ElucidatedDiffusion(nn.Module):
    def __init__(self, net, *, image_size, channels=3, sigma_data=0.5):
        super().__init__()
        self.net, self.image_size, self.channels, self.sigma_data = net, image_size, channels, sigma_data
        self.self_condition = net.self_condition

    @property
    def device(self):
        return next(self.net.parameters()).device

    def c_skip(self, sigma):
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma):
        return sigma * self.sigma_data * (sigma**2 + self.sigma_data**2) ** -0.5

    def c_in(self, sigma):
        return (sigma**2 + self.sigma_data**2) ** -0.5

    def c_noise(self, sigma):
        return sigma.log() / 4

    def loss_weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) * (sigma * self.sigma_data) ** -2

    def noise_distribution(self, batch_size):
        return (-1.2 + 1.2 * torch.randn(batch_size)).exp()

    def preconditioned_network_forward(self, noised, sigma, self_cond=None, clamp=False):
        wide = spread(sigma, noised)
        out = self.net(self.c_in(wide) * noised, self.c_noise(sigma), self_cond)
        return self.c_skip(wide) * noised + self.c_out(wide) * out

    def forward(self, images, *args, sigma=None, loss_reduction="mean", **kwargs):
        x0 = 2 * images - 1
        sigma = self.noise_distribution(len(x0)) if sigma is None else sigma
        noised = x0 + spread(sigma, x0) * torch.randn_like(x0)
        condition = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                condition = self.preconditioned_network_forward(noised, sigma)
        denoised = self.preconditioned_network_forward(noised, sigma, condition)
        loss = ((denoised - x0) ** 2).flatten(1).mean(1) * self.loss_weight(sigma)
        return loss if loss_reduction == "none" else loss.mean()


# -- guided-diffusion


MeanType = enum.Enum("ModelMeanType", ["PREVIOUS_X", "START_X", "EPSILON"])
VarType = enum.Enum("ModelVarType", ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
LossType = enum.Enum("LossType", ["MSE", "RESCALED_MSE", "KL"])


class Diffusion:
    """An object with guided-diffusion's interface."""

    def __init__(self, mean="EPSILON", var="FIXED_SMALL", loss="MSE", steps=100):
        self.model_mean_type, self.model_var_type, self.loss_type = MeanType[mean], VarType[var], LossType[loss]
        self.betas = beta = np.linspace(1e-3, 0.1, steps)
        self.num_timesteps = steps
        self.alphas_cumprod = abar = np.cumprod(1 - beta)
        self.alphas_cumprod_prev = before = np.append(1.0, abar[:-1])
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = np.sqrt(abar), np.sqrt(1 - abar)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = abar**-0.5, np.sqrt(1 / abar - 1)
        self.posterior_variance = variance = beta * (1 - before) / (1 - abar)
        self.posterior_log_variance_clipped = np.log(np.append(variance[1], variance[1:]))
        self.posterior_mean_coef1 = beta * np.sqrt(before) / (1 - abar)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - beta) / (1 - abar)

    def at(self, table, t, x):
        return spread(torch.from_numpy(np.asarray(table))[t].float(), x)

    def _scale_timesteps(self, t):
        return t.float() * (1000 / self.num_timesteps)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        a, s = self.at(self.sqrt_alphas_cumprod, t, noise), self.at(self.sqrt_one_minus_alphas_cumprod, t, noise)
        return a * x_start + s * noise

    def mean_of(self, x0, x, t):
        return self.at(self.posterior_mean_coef1, t, x) * x0 + self.at(self.posterior_mean_coef2, t, x) * x

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        m = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        small, kind = self.posterior_log_variance_clipped, self.model_var_type.name
        if kind.startswith("LEARNED"):
            m, v = m.chunk(2, 1)
            if kind == "LEARNED":
                log = v
            else:
                fraction = (v + 1) / 2
                log = fraction * self.at(np.log(self.betas), t, x) + (1 - fraction) * self.at(small, t, x)
            variance = log.exp()
        elif kind == "FIXED_SMALL":
            log, variance = (self.at(v, t, x).expand(x.shape) for v in (small, self.posterior_variance))
        else:
            large = np.append(self.posterior_variance[1], self.betas[1:])
            log, variance = (self.at(v, t, x).expand(x.shape) for v in (np.log(large), large))
        name = self.model_mean_type.name
        if name == "EPSILON":
            x0 = self.at(self.sqrt_recip_alphas_cumprod, t, x) * x - self.at(self.sqrt_recipm1_alphas_cumprod, t, x) * m
        elif name == "START_X":
            x0 = m
        else:
            c1, c2 = self.posterior_mean_coef1, self.posterior_mean_coef2
            x0 = self.at(1 / c1, t, x) * m - self.at(c2 / c1, t, x) * x
        x0 = denoised_fn(x0) if denoised_fn else x0
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = m if name == "PREVIOUS_X" else self.mean_of(x0, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log, "pred_xstart": x0}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        mean = out["mean"] if cond_fn is None else out["mean"] + out["variance"] * cond_fn(x, t)
        sample = mean + spread((t != 0).float(), x) * (0.5 * out["log_variance"]).exp() * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        x0 = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        eps = (self.at(self.sqrt_recip_alphas_cumprod, t, x) * x - x0) / self.at(self.sqrt_recipm1_alphas_cumprod, t, x)
        abar, before = self.alphas_cumprod, self.alphas_cumprod_prev
        sigma = eta * np.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
        mean = self.at(np.sqrt(before), t, x) * x0 + self.at(np.sqrt(1 - before - sigma**2), t, x) * eps
        noise = torch.randn_like(x)
        return {"sample": mean + spread((t != 0).float(), x) * self.at(sigma, t, x) * noise, "pred_xstart": x0}

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        out = self.p_mean_variance(model, x_t, t, clip_denoised)
        true, log = self.mean_of(x_start, x_t, t), self.at(self.posterior_log_variance_clipped, t, x_t)
        other = out["log_variance"]
        kl = -1 + other - log + torch.exp(log - other) + (true - out["mean"]) ** 2 * torch.exp(-other)
        return {"output": 0.5 * kl.flatten(1).mean(1) / math.log(2.0)}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type.name == "KL":
            return {"loss": self._vb_terms_bpd(model, x_start, x_t, t, False)["output"]}
        m = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        terms = {}
        if self.model_var_type.name.startswith("LEARNED"):
            m, v = m.chunk(2, 1)
            frozen = torch.cat([m.detach(), v], 1)
            terms["vb"] = self._vb_terms_bpd(lambda *a, r=frozen: r, x_start, x_t, t, False)["output"]
            if self.loss_type.name == "RESCALED_MSE":
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        target = {"EPSILON": noise, "START_X": x_start, "PREVIOUS_X": self.mean_of(x_start, x_t, t)}
        terms["mse"] = ((target[self.model_mean_type.name] - m) ** 2).flatten(1).mean(1)
        terms["loss"] = terms["mse"] + terms.get("vb", 0)
        return terms


class Respaced(Diffusion):
    """Every fifth step of 100; the network is told the original timesteps."""

    def __init__(self, *kinds):
        super().__init__(*kinds, steps=20)

    def _wrap_model(self, model):
        return model if getattr(model, "wrapped", False) else Wrapped(model)

    def _scale_timesteps(self, t):
        return t

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)


class Wrapped:
    wrapped = True

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t, **kwargs):
        return self.model(x, 5 * t.float(), **kwargs)


class Network(nn.Module):
    def __init__(self, learned):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(2, 4 if learned else 2, 3, padding=1)

    def forward(self, x, t, shift=0.0):
        return torch.tanh(self.conv(x)) + 1e-4 * spread(t.float(), x) + shift


# -- k-diffusion's losses


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x, t, **kwargs):
        return torch.sin(self.scale * x) + 0.01 * spread(t.float(), x)


class Denoiser(nn.Module):
    """k-diffusion's, of one kind: "edm", "v" or "eps"."""

    def __init__(self, kind="edm", sigma_data=0.5, scales=1):
        super().__init__()
        self.inner_model, self.kind, self.sigma_data, self.scales = Inner(), kind, sigma_data, scales
        if kind == "edm":
            self.weighting = lambda s: (s * self.sigma_data) ** 2 / (s**2 + self.sigma_data**2) ** 2
        else:
            self.sigma_data, self.sigma_to_t = 1.0, lambda s: s.atan() / math.pi * 2

    def get_scalings(self, sigma):
        d = self.sigma_data
        c_in = 1 / (sigma**2 + d**2) ** 0.5
        if self.kind == "eps":
            return -sigma, c_in
        return d**2 / (sigma**2 + d**2), (-1 if self.kind == "v" else 1) * sigma * d * c_in, c_in

    def loss(self, input, noise, sigma, **kwargs):
        scalings = [spread(row, input) for row in self.get_scalings(sigma)]
        x = input + noise * spread(sigma, input)
        m = self.inner_model(x * scalings[-1], sigma if self.kind == "edm" else self.sigma_to_t(sigma), **kwargs)
        target = noise if self.kind == "eps" else (input - scalings[0] * x) / scalings[1]
        loss = ((m - target) ** 2).flatten(1).mean(1)
        return loss * self.weighting(sigma) if self.kind == "edm" else loss


class EpsDenoiser(Denoiser):
    def get_eps(self, *args, **kwargs):
        return self.inner_model(*args, **kwargs)


# -- flow_matching, torchcfm and SiT


half = math.pi / 2


class Path:
    """flow_matching's AffineProbPath, by its interface."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


def scheduler(alpha, sigma, d_alpha, d_sigma):
    def at(t):
        return types.SimpleNamespace(alpha_t=alpha(t), sigma_t=sigma(t), d_alpha_t=d_alpha(t), d_sigma_t=d_sigma(t))

    return at


COND_OT = scheduler(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t))
COSINE = scheduler(
    lambda t: (half * t).sin(), lambda t: (half * t).cos(), lambda t: half * (half * t).cos(),
    lambda t: -half * (half * t).sin(),
)  # fmt: skip


class Matcher:
    """torchcfm's matchers, by their interface: "plain", "target", "bridge" and "vp"."""

    def __init__(self, kind, sigma):
        self.kind, self.sigma = kind, sigma

    def compute_mu_t(self, x0, x1, t):
        t = spread(t, x0)
        if self.kind == "vp":
            return (half * t).cos() * x0 + (half * t).sin() * x1
        return t * x1 if self.kind == "target" else t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t):
        if self.kind == "target":
            return 1 - (1 - self.sigma) * t
        return self.sigma * (t * (1 - t)).sqrt() if self.kind == "bridge" else self.sigma

    def compute_conditional_flow(self, x0, x1, t, xt):
        w = spread(t, x0)
        if self.kind == "target":
            return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * w)
        if self.kind == "bridge":
            return (1 - 2 * w) / (2 * w * (1 - w) + 1e-8) * (xt - self.compute_mu_t(x0, x1, t)) + x1 - x0
        if self.kind == "vp":
            return half * ((half * w).cos() * x1 - (half * w).sin() * x0)
        return x1 - x0

    def sample_location_and_conditional_flow(self, x0, x1):
        t = torch.rand(len(x0)).type_as(x0)
        eps = torch.randn_like(x0)
        sigma = torch.as_tensor(self.compute_sigma_t(t)).expand(t.shape)
        xt = self.compute_mu_t(x0, x1, t) + spread(sigma, x0) * eps
        return t, xt, self.compute_conditional_flow(x0, x1, t, xt)


ModelType = enum.Enum("ModelType", ["NOISE", "SCORE", "VELOCITY"])
WeightType = enum.Enum("WeightType", ["NONE", "VELOCITY", "LIKELIHOOD"])


class Plan:
    """SiT's linear or trigonometric path."""

    def __init__(self, linear):
        self.linear = linear

    def compute_alpha_t(self, t):
        return (t, 1) if self.linear else ((half * t).sin(), half * (half * t).cos())

    def compute_sigma_t(self, t):
        return (1 - t, -1) if self.linear else ((half * t).cos(), -half * (half * t).sin())

    def compute_drift(self, x, t):
        t = spread(t, x)
        ratio = 1 / t if self.linear else half / (half * t).tan()
        sigma, d_sigma = self.compute_sigma_t(t)
        return -ratio * x, ratio * sigma**2 - sigma * d_sigma


class Transport:
    def __init__(self, model, weight, linear):
        self.model_type, self.loss_type, self.path_sampler = ModelType[model], WeightType[weight], Plan(linear)

    def sample(self, x1):
        x0 = torch.randn_like(x1)
        return (torch.rand(len(x1)) * 0.998 + 0.001).to(x1), x0, x1

    def training_losses(self, model, x1, model_kwargs=None):
        t, x0, x1 = self.sample(x1)
        (a, da), (s, ds) = (
            self.path_sampler.compute_alpha_t(spread(t, x1)),
            self.path_sampler.compute_sigma_t(spread(t, x1)),
        )
        x_t = a * x1 + s * x0
        m = model(x_t, t, **(model_kwargs or {}))
        if self.model_type.name == "VELOCITY":
            error = (m - (da * x1 + ds * x0)) ** 2
        else:
            drift = self.path_sampler.compute_drift(x_t, t)[1]
            weight = {"NONE": 1, "VELOCITY": (drift / s) ** 2, "LIKELIHOOD": drift / s**2}[self.loss_type.name]
            error = weight * (m - x0) ** 2 if self.model_type.name == "NOISE" else weight * (m * s + x0) ** 2
        return {"pred": m, "loss": error.flatten(1).mean(1)}
