"""Small models in the styles in which public code writes them, each with what it is fed and what must come of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

BATCH, CLASSES = 4, 3


@dataclass(frozen=True)
class Case:
    """A model as people write it.

    Attributes:
        model, x: made anew by each call, after seeding.
        target: from the output; class labels where it is None.
        cost: as `mep` takes it; `cost_of(model)` makes one that reads the model.
        leaves: modules that are kept whole.
        verdict: "right", or "refused": by an error of mep's with a way out.
        place: what a refusal says of the place, a regular expression.
        is_smooth: whether predictions are continuous in the states, so that the error falls in proportion to beta.
    """

    model: Callable[[], nn.Module]
    x: Callable[[], Any]
    target: Callable[[Any], Any] | None = None
    cost: Any = "cross_entropy"
    cost_of: Callable[[nn.Module], Any] | None = None
    leaves: tuple[type[nn.Module] | str, ...] = ()
    verdict: str = "right"
    place: str = ""
    is_smooth: bool = True

    def build(self, seed: int = 0) -> tuple[nn.Module, Any, Any, Any]:
        """The model in float64, an input, a target and the cost: the same ones for the same seed."""
        torch.manual_seed(seed)
        model, x = self.model().double(), doubled(self.x())
        torch.manual_seed(seed + 1)
        target = labels() if self.target is None else self.target(x)
        return model, x, target, self.cost if self.cost_of is None else self.cost_of(model)


def doubled(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: doubled(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(doubled(v) for v in x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def features(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *(shape or (4,)))


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (BATCH, *shape))


def numbers(*shape: int) -> Callable[[Any], Tensor]:
    """A target of real numbers."""
    return lambda _: torch.randn(BATCH, *shape).double()


def mlp(*between: nn.Module, inner: int = 4, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, width), *between, nn.Linear(width, CLASSES))


def per_example(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)


# Normalisation.


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x).type_as(x) * self.weight


class SwiGLUBlock(nn.Module):
    """The feed-forward half of a Llama block."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class AnnotatedLayerNorm(nn.Module):
    """With the standard deviation, not the variance, and epsilon outside of the root."""

    def __init__(self, features: int, eps: float = 1e-6):
        super().__init__()
        self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class HandGroupNorm(nn.Module):
    def __init__(self, channels: int, groups: int = 2, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.groups, self.eps = groups, eps

    def forward(self, x):
        N, C, H, W = x.size()
        G = self.groups
        assert C % G == 0
        x = x.view(N, G, -1)
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True)
        x = (x - mean) / (var + self.eps).sqrt()
        x = x.view(N, C, H, W)
        return x * self.weight + self.bias


class WSConv2d(nn.Conv2d):
    """Weights are standardised before each convolution."""

    def forward(self, x):
        weight = self.weight
        weight_mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - weight_mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def small_cnn(conv: type[nn.Conv2d] = nn.Conv2d, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        conv(2, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True), conv(4, 4, 3, padding=1), norm(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


class BatchRenorm1d(nn.Module):
    """Corrections from running statistics, which pass no gradient, and statistics written in place."""

    def __init__(self, num_features: int, eps: float = 1e-3, momentum: float = 0.01):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.eps, self.momentum = eps, momentum

    @property
    def rmax(self):
        return (2 / 35000 * self.num_batches_tracked + 25 / 35).clamp_(1.0, 3.0)

    @property
    def dmax(self):
        return (5 / 20000 * self.num_batches_tracked - 25 / 20).clamp_(0.0, 5.0)

    def forward(self, x):
        if self.training:
            batch_mean = x.mean(0)
            batch_std = x.std(0, unbiased=False) + self.eps
            r = (batch_std.detach() / self.running_std.view_as(batch_std)).clamp_(1 / self.rmax, self.rmax)
            d = (batch_mean.detach() - self.running_mean.view_as(batch_mean)) / self.running_std.view_as(batch_std)
            d = d.clamp_(-self.dmax, self.dmax)
            x = (x - batch_mean) / batch_std * r + d
            self.running_mean += self.momentum * (batch_mean.detach() - self.running_mean)
            self.running_std += self.momentum * (batch_std.detach() - self.running_std)
            self.num_batches_tracked += 1
        else:
            x = (x - self.running_mean) / self.running_std
        return self.weight * x + self.bias


class MovingNorm(nn.Module):
    """Statistics that are bound anew in each forward, or written by several operations."""

    def __init__(self, features: int, rebinds: bool = True, momentum: float = 0.9):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.gamma, self.momentum, self.rebinds = nn.Parameter(torch.ones(features)), momentum, rebinds

    def forward(self, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        if self.training and self.rebinds:
            self.running_mean = self.momentum * self.running_mean + (1.0 - self.momentum) * mean.detach()
            self.running_var = self.momentum * self.running_var + (1.0 - self.momentum) * var.detach()
        elif self.training:
            self.running_mean.mul_(self.momentum).add_(mean.detach(), alpha=1 - self.momentum)
            self.running_var.mul_(self.momentum)
            self.running_var.add_((1 - self.momentum) * var.detach())
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5)


class SwitchNorm(nn.Module):
    """A learnt mixture of the statistics of instance, layer and batch."""

    def __init__(self, channels: int, momentum: float = 0.9, eps: float = 1e-5):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = (
            nn.Parameter(torch.ones(1, channels, 1, 1)),
            nn.Parameter(torch.zeros(1, channels, 1, 1)),
        )
        self.mean_weight, self.var_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.zeros(1, channels, 1))

    def forward(self, x):
        N, C, H, W = x.size()
        x = x.view(N, C, -1)
        mean_in = x.mean(-1, keepdim=True)
        var_in = x.var(-1, keepdim=True)
        mean_ln = mean_in.mean(1, keepdim=True)
        temp = var_in + mean_in**2
        var_ln = temp.mean(1, keepdim=True) - mean_ln**2
        if self.training:
            mean_bn = mean_in.mean(0, keepdim=True)
            var_bn = temp.mean(0, keepdim=True) - mean_bn**2
            self.running_mean.mul_(self.momentum)
            self.running_mean.add_((1 - self.momentum) * mean_bn.data)
            self.running_var.mul_(self.momentum)
            self.running_var.add_((1 - self.momentum) * var_bn.data)
        else:
            mean_bn, var_bn = self.running_mean, self.running_var
        mean_weight, var_weight = F.softmax(self.mean_weight, 0), F.softmax(self.var_weight, 0)
        mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln + mean_weight[2] * mean_bn
        var = var_weight[0] * var_in + var_weight[1] * var_ln + var_weight[2] * var_bn
        x = (x - mean) / (var + self.eps).sqrt()
        return x.view(N, C, H, W) * self.weight + self.bias


class ActNorm(nn.Module):
    """Its first batch sets scale and shift; a buffer says whether it has."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, channels)), nn.Parameter(torch.ones(1, channels))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def initialize(self, input):
        with torch.no_grad():
            self.loc.data.copy_(-input.mean(0, keepdim=True))
            self.scale.data.copy_(1 / (input.std(0, keepdim=True) + 1e-6))

    def forward(self, input):
        if self.initialized.item() == 0:
            self.initialize(input)
            self.initialized.fill_(1)
        return self.scale * (input + self.loc)


class FlaggedActNorm(ActNorm):
    """The same with a flag of Python's."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.inited = False

    def forward(self, input):
        if not self.inited:
            self.initialize(input)
            self.inited = True
        return self.scale * (input + self.loc)


def initialised(model: nn.Module) -> nn.Module:
    model.double()(torch.randn(16, 4).double())
    return model


class FiLM(nn.Module):
    """A second input scales and shifts the features of the first."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.film, self.head = nn.Linear(3, 8), nn.Linear(4, CLASSES)

    def forward(self, image, question):
        gamma, beta = torch.split(self.film(question), 4, dim=1)
        h = self.bn(self.conv(image))
        gamma, beta = gamma.unsqueeze(2).unsqueeze(3).expand_as(h), beta.unsqueeze(2).unsqueeze(3).expand_as(h)
        return self.head(F.relu(gamma * h + beta).mean(dim=(2, 3)))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Adaptive layer norm with gates, by a timestep embedded with sines."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.t_embedder = nn.Sequential(nn.Linear(4, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.proj = nn.Linear(4, dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, bias=True))
        self.final = nn.Linear(dim, 4)

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        half = dim // 2
        freqs = torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=t.dtype) / half)
        args = t[:, None] * freqs[None]
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)

    def forward(self, x, t):
        c = self.t_embedder(self.timestep_embedding(t, 4))
        x = self.proj(x)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift_msa, scale_msa)
        x = x + gate_msa.unsqueeze(1) * self.attn(h, h, h, need_weights=False)[0]
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return self.final(x)


class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.num_features = num_features
        self.bn = nn.BatchNorm2d(num_features, affine=False)
        self.embed = nn.Embedding(num_classes, num_features * 2)
        self.embed.weight.data[:, :num_features].normal_(1, 0.02)
        self.embed.weight.data[:, num_features:].zero_()

    def forward(self, x, y):
        out = self.bn(x)
        gamma, beta = self.embed(y).chunk(2, 1)
        return gamma.view(-1, self.num_features, 1, 1) * out + beta.view(-1, self.num_features, 1, 1)


class Generator(nn.Module):
    """A class-conditional generator: upsampling, conditional batch norm, a shortcut."""

    def __init__(self):
        super().__init__()
        self.l1, self.bn1, self.bn2 = nn.Linear(4, 16), ConditionalBatchNorm2d(4, 3), ConditionalBatchNorm2d(4, 3)
        self.c1, self.c2, self.last = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, z, y):
        h = self.l1(z).view(z.size(0), -1, 2, 2)
        up = lambda t: F.interpolate(t, scale_factor=2, mode="nearest")  # noqa: E731
        out = self.c1(up(F.relu(self.bn1(h, y))))
        out = self.c2(F.relu(self.bn2(out, y)))
        return torch.tanh(self.last(out + up(h)))


NORMS = {
    "Llama's RMSNorm and SwiGLU": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), SwiGLUBlock(6, 8), SwiGLUBlock(6, 8), RMSNorm(6), nn.Linear(6, 3)),
        features(),
    ),
    "layer norm by hand": Case(lambda: mlp(AnnotatedLayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.Tanh()), features()),
    "group norm by hand": Case(lambda: small_cnn(norm=HandGroupNorm), features(2, 4, 4)),
    "weight standardisation": Case(
        lambda: small_cnn(WSConv2d, lambda c: nn.GroupNorm(2, c)), features(2, 4, 4)
    ),
    "batch renorm": Case(lambda: mlp(BatchRenorm1d(6), nn.Tanh(), nn.Linear(6, 6), BatchRenorm1d(6)), features()),
    "statistics bound anew": Case(lambda: mlp(MovingNorm(6), nn.Tanh()), features()),
    "statistics bound anew, kept whole": Case(
        lambda: mlp(MovingNorm(6), nn.Tanh()), features(), leaves=(MovingNorm,)
    ),
    "statistics written twice": Case(lambda: mlp(MovingNorm(6, False), nn.Tanh()), features()),
    "switchable norm": Case(
        lambda: small_cnn(norm=SwitchNorm), features(2, 4, 4)
    ),
    "switchable norm, kept whole": Case(lambda: small_cnn(norm=SwitchNorm), features(2, 4, 4), leaves=(SwitchNorm,)),
    "data-dependent initialisation, buffer": Case(
        lambda: mlp(ActNorm(6), nn.Tanh()), features(), verdict="refused", place=r"initialized\.item\(\) == 0"
    ),
    "data-dependent initialisation, buffer, done and kept whole": Case(
        lambda: initialised(mlp(ActNorm(6), nn.Tanh())), features(), leaves=(ActNorm,)
    ),
    "data-dependent initialisation, buffer, kept whole": Case(
        lambda: mlp(ActNorm(6), nn.Tanh()), features(), leaves=(ActNorm,), verdict="refused", place=r"`1|ActNorm"
    ),
    "data-dependent initialisation, flag": Case(
        lambda: mlp(FlaggedActNorm(6), nn.Tanh()), features(), verdict="refused", place=r"`1`|`1\.|FlaggedActNorm"
    ),
    "data-dependent initialisation, flag, done": Case(
        lambda: initialised(mlp(FlaggedActNorm(6), nn.Tanh())), features()
    ),
    "FiLM": Case(FiLM, lambda: (torch.randn(BATCH, 2, 4, 4), torch.randn(BATCH, 3))),
    "adaptive layer norm": Case(
        DiTBlock, lambda: (torch.randn(BATCH, 3, 4), 10 * torch.rand(BATCH)), numbers(3, 4), "mse"
    ),
    "conditional batch norm": Case(
        Generator, lambda: (torch.randn(BATCH, 4), labels()), numbers(1, 4, 4), "mse"
    ),
}  # fmt: skip


# Quantisers.


class VectorQuantizer(nn.Module):
    """The nearest code, straight through by detach; its loss trains codes and encoder."""

    def __init__(self, n_e: int = 5, e_dim: int = 3, beta: float = 0.25):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z_flattened = z.view(-1, self.e_dim)
        d = (
            torch.sum(z_flattened**2, dim=1, keepdim=True)
            + torch.sum(self.embedding.weight**2, dim=1)
            - 2 * torch.matmul(z_flattened, self.embedding.weight.t())
        )
        min_encoding_indices = torch.argmin(d, dim=1).unsqueeze(1)
        min_encodings = torch.zeros(min_encoding_indices.shape[0], self.n_e).to(z)
        min_encodings.scatter_(1, min_encoding_indices, 1)
        z_q = torch.matmul(min_encodings, self.embedding.weight).view(z.shape)
        loss = torch.mean((z_q.detach() - z) ** 2) + self.beta * torch.mean((z_q - z.detach()) ** 2)
        z_q = z + (z_q - z).detach()
        return loss, z_q, min_encoding_indices


class VQVAE(nn.Module):
    def __init__(self, quantizer: Callable[[], nn.Module] = VectorQuantizer):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.quantizer = quantizer()
        self.decoder = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        loss, z_q, _ = self.quantizer(self.encoder(x))
        return loss, self.decoder(z_q)


def vq_cost(output, x):
    embedding_loss, x_hat = output
    return F.mse_loss(x_hat, x) + embedding_loss


class EMAQuantizer(nn.Module):
    """Codes are buffers, moved toward the mean of what they stand for."""

    def __init__(self, n_e: int = 5, e_dim: int = 3, decay: float = 0.9):
        super().__init__()
        embed = torch.randn(e_dim, n_e)
        self.n_embed, self.dim, self.decay, self.eps = n_e, e_dim, decay, 1e-5
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_e))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        flatten = input.reshape(-1, self.dim)
        dist = flatten.pow(2).sum(1, keepdim=True) - 2 * flatten @ self.embed + self.embed.pow(2).sum(0, keepdim=True)
        _, embed_ind = (-dist).max(1)
        embed_onehot = F.one_hot(embed_ind, self.n_embed).type(flatten.dtype)
        quantize = F.embedding(embed_ind, self.embed.transpose(0, 1)).view_as(input)
        if self.training:
            embed_onehot_sum = embed_onehot.sum(0)
            embed_sum = flatten.transpose(0, 1) @ embed_onehot
            self.cluster_size.data.mul_(self.decay).add_(embed_onehot_sum, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(embed_sum, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            cluster_size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            self.embed.data.copy_(self.embed_avg / cluster_size.unsqueeze(0))
        diff = (quantize.detach() - input).pow(2).mean()
        quantize = input + (quantize - input).detach()
        return 0.25 * diff, quantize, embed_ind


class GuardedEMAQuantizer(EMAQuantizer):
    """The same under no_grad."""

    @torch.no_grad()
    def moved(self, flatten, onehot):
        self.cluster_size.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(flatten.t() @ onehot, alpha=1 - self.decay)
        n = self.cluster_size.sum()
        cluster_size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
        self.embed.copy_(self.embed_avg / cluster_size.unsqueeze(0))

    def forward(self, input):
        flatten = input.reshape(-1, self.dim)
        embed_ind = torch.cdist(flatten.detach(), self.embed.t().clone()).argmin(-1)
        onehot = F.one_hot(embed_ind, self.n_embed).type(flatten.dtype)
        quantize = F.embedding(embed_ind, self.embed.t()).view_as(input)
        if self.training:
            self.moved(flatten, onehot)
        diff = (quantize.detach() - input).pow(2).mean()
        return 0.25 * diff, input + (quantize - input).detach(), embed_ind


class ResidualQuantizer(nn.Module):
    """Each stage quantises what the earlier ones left."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([VectorQuantizer(e_dim=6) for _ in range(2)])

    def forward(self, x):
        quantized_out, residual, losses = 0.0, x, []
        for layer in self.layers:
            loss, quantized, _ = layer(residual)
            residual = residual - quantized.detach()
            quantized_out = quantized_out + quantized
            losses.append(loss)
        return torch.stack(losses).sum(), quantized_out, None


class FSQ(nn.Module):
    """Each channel is bounded and rounded to a few levels."""

    def __init__(self, levels=(5, 4, 3)):
        super().__init__()
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.project_in, self.project_out = nn.Linear(6, len(levels)), nn.Linear(len(levels), 6)

    def bound(self, z, eps=1e-3):
        half_l = (self._levels - 1) * (1 + eps) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half_l).atanh()
        return (z + shift).tanh() * half_l - offset

    @staticmethod
    def round_ste(z):
        return z + (z.round() - z).detach()

    def forward(self, z):
        quantized = self.round_ste(self.bound(self.project_in(z)))
        return self.project_out(quantized / (self._levels // 2))


class LFQ(nn.Module):
    """Signs as a code, and an entropy loss that forward leaves on the module."""

    def __init__(self, dim: int = 6, bits: int = 3):
        super().__init__()
        self.project_in, self.project_out = nn.Linear(dim, bits), nn.Linear(bits, dim)
        all_codes = torch.arange(2**bits)
        mask = 2 ** torch.arange(bits - 1, -1, -1)
        self.register_buffer("mask", mask)
        self.register_buffer("codebook", ((all_codes[..., None].int() & mask) != 0).float() * 2 - 1)
        self.aux_loss = None

    def forward(self, x):
        x = self.project_in(x)
        quantized = torch.where(x > 0, torch.ones_like(x), -torch.ones_like(x))
        distance = -2 * torch.einsum("...id,jd->...ij", x.unsqueeze(1), self.codebook)
        prob = (-distance * 2).softmax(dim=-1)
        per_sample_entropy = (-prob * prob.clamp(min=1e-5).log()).sum(-1).mean()
        avg_prob = prob.mean(dim=(0, 1))
        codebook_entropy = (-avg_prob * avg_prob.clamp(min=1e-5).log()).sum()
        self.aux_loss = per_sample_entropy - codebook_entropy + 0.25 * F.mse_loss(x, quantized.detach())
        x = x + (quantized - x).detach()
        return self.project_out(x)


def with_aux(weight: float = 0.1) -> Callable[[nn.Module], Any]:
    """The cross-entropy of a batch, and every `aux_loss` that forward left on a module."""

    def cost_of(model):
        def cost(output, target):
            aux = sum(m.aux_loss for m in model.modules() if getattr(m, "aux_loss", None) is not None)
            return F.cross_entropy(output, target) + weight * aux

        return cost

    return cost_of


class CategoricalVAE(nn.Module):
    def __init__(self, hard: bool = True):
        super().__init__()
        self.enc, self.dec, self.hard = nn.Linear(4, 6), nn.Linear(6, 4), hard

    def forward(self, x):
        logits = self.enc(x).view(-1, 2, 3)
        z = F.gumbel_softmax(logits, tau=1.0, hard=self.hard, dim=-1)
        qy = F.softmax(logits, dim=-1)
        return self.dec(torch.tanh(z.view(-1, 6))), qy


def categorical_elbo(output, x):
    recon, qy = output
    kld = torch.sum(qy * torch.log(qy * 3 + 1e-20), dim=(-1, -2))
    return (recon - x).square().sum(-1) + kld


class FunLSQ(torch.autograd.Function):
    """Quantises to a learnt step size, whose gradient is written by hand."""

    @staticmethod
    def forward(ctx, weight, alpha, g, Qn, Qp):
        ctx.save_for_backward(weight, alpha)
        ctx.other = g, Qn, Qp
        return (weight / alpha).round().clamp(Qn, Qp) * alpha

    @staticmethod
    def backward(ctx, grad_weight):
        weight, alpha = ctx.saved_tensors
        g, Qn, Qp = ctx.other
        q_w = weight / alpha
        smaller, bigger = (q_w < Qn).to(q_w.dtype), (q_w > Qp).to(q_w.dtype)
        between = 1.0 - smaller - bigger
        grad_alpha = ((smaller * Qn + bigger * Qp + between * (-q_w + q_w.round())) * grad_weight * g).sum().view(1)
        return between * grad_weight, grad_alpha, None, None, None


class LinearLSQ(nn.Linear):
    def __init__(self, inner: int, outer: int, bits: int = 3):
        super().__init__(inner, outer)
        self.Qn, self.Qp = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.alpha = nn.Parameter(torch.full((1,), 0.2))
        self.act_alpha = nn.Parameter(torch.full((1,), 0.4))

    def forward(self, x):
        g = 1.0 / math.sqrt(self.weight.numel() * self.Qp)
        weight_q = FunLSQ.apply(self.weight, self.alpha, g, self.Qn, self.Qp)
        x = FunLSQ.apply(x, self.act_alpha, 1.0 / math.sqrt(x.size(1) * 7), -4, 3)
        return F.linear(x, weight_q, self.bias)


def grad_scale(x, scale):
    y, y_grad = x, x * scale
    return (y - y_grad).detach() + y_grad


def round_pass(x):
    y, y_grad = x.round(), x
    return (y - y_grad).detach() + y_grad


class DetachedLSQ(nn.Linear):
    """The same by detach."""

    def __init__(self, inner: int, outer: int):
        super().__init__(inner, outer)
        self.s = nn.Parameter(self.weight.detach().abs().mean() * 2 / (3**0.5))

    def forward(self, x):
        s_scale = grad_scale(self.s, 1.0 / ((3 * self.weight.numel()) ** 0.5))
        w = torch.clamp(self.weight / s_scale, -4, 3)
        return F.linear(x, round_pass(w) * s_scale, self.bias)


class BinaryActivation(torch.autograd.Function):
    """The sign, with the gradient of hardtanh."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.sign()

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad_input[input.ge(1)] = 0
        grad_input[input.le(-1)] = 0
        return grad_input


class BinaryLinear(nn.Linear):
    """XNOR-Net: signs of the weights times their mean size."""

    def forward(self, x):
        x = BinaryActivation.apply(x)
        scaling = self.weight.abs().mean(dim=1, keepdim=True).detach()
        binary_weights_no_grad = scaling * torch.sign(self.weight)
        cliped_weights = torch.clamp(self.weight, -1.0, 1.0)
        binary_weights = binary_weights_no_grad.detach() - cliped_weights.detach() + cliped_weights
        return F.linear(x, binary_weights, self.bias)


class BitLinear(nn.Linear):
    """Ternary weights and eight-bit activations."""

    @staticmethod
    def activation_quant(x):
        scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        return (x * scale).round().clamp_(-128, 127) / scale

    @staticmethod
    def weight_quant(w):
        scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
        return (w * scale).round().clamp_(-1, 1) / scale

    def forward(self, x):
        w = self.weight
        x_norm = F.layer_norm(x, (x.shape[-1],))
        x_quant = x_norm + (self.activation_quant(x_norm) - x_norm).detach()
        w_quant = w + (self.weight_quant(w) - w).detach()
        return F.linear(x_quant, w_quant)


QUANTISERS = {
    "VQ-VAE": Case(VQVAE, features(), lambda x: x, vq_cost),
    "VQ-VAE, moving averages": Case(
        lambda: VQVAE(EMAQuantizer), features(), lambda x: x, vq_cost
    ),
    "VQ-VAE, moving averages, kept whole": Case(
        lambda: VQVAE(EMAQuantizer), features(), lambda x: x, vq_cost, leaves=(EMAQuantizer,)
    ),
    "VQ-VAE, moving averages, no_grad": Case(lambda: VQVAE(GuardedEMAQuantizer), features(), lambda x: x, vq_cost),
    "residual quantisation": Case(lambda: VQVAE(ResidualQuantizer), features(), lambda x: x, vq_cost),
    "finite scalar quantisation": Case(lambda: mlp(nn.Tanh(), FSQ(), nn.Tanh()), features()),
    "lookup-free quantisation": Case(lambda: mlp(nn.Tanh(), LFQ(), nn.Tanh()), features(), cost_of=with_aux()),
    "hard Gumbel softmax": Case(CategoricalVAE, features(), lambda x: x, categorical_elbo),
    "learnt step size, autograd function": Case(lambda: nn.Sequential(nn.Linear(4, 6), LinearLSQ(6, 3)), features()),
    "learnt step size, detach": Case(
        lambda: nn.Sequential(DetachedLSQ(4, 6), nn.ReLU(), DetachedLSQ(6, 3)), features()
    ),
    "binary weights and activations": Case(
        lambda: mlp(nn.BatchNorm1d(6), BinaryLinear(6, 6), nn.BatchNorm1d(6)), features()
    ),
    "ternary weights": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), BitLinear(6, 6), nn.ReLU(), BitLinear(6, 3)), features(), is_smooth=False
    ),
}  # fmt: skip


# Mixtures of experts.


class SoftMoE(nn.Module):
    """All experts at once, weighted by a softmax."""

    def __init__(self, dim: int = 6, experts: int = 3):
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) for _ in range(experts)])

    def forward(self, x):
        weights = F.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return (outputs * weights.unsqueeze(1)).sum(dim=2)


class NoisyTopKMoE(nn.Module):
    """Noisy top-k gates scattered into zeros, and the squared variation of importance as a loss."""

    def __init__(self, dim: int = 6, num_experts: int = 4, k: int = 2):
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.w_gate = nn.Parameter(torch.randn(dim, num_experts))
        self.w_noise = nn.Parameter(0.1 * torch.randn(dim, num_experts))
        self.experts = nn.ModuleList([nn.Linear(dim, dim) for _ in range(num_experts)])
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        self.aux_loss = None

    def cv_squared(self, x):
        eps = 1e-10
        if x.shape[0] == 1:
            return torch.tensor([0], device=x.device, dtype=x.dtype)
        return x.var() / (x.mean() ** 2 + eps)

    def noisy_top_k_gating(self, x, train, noise_epsilon=1e-2):
        clean_logits = x @ self.w_gate
        if train:
            noise_stddev = self.softplus(x @ self.w_noise) + noise_epsilon
            logits = clean_logits + torch.randn_like(clean_logits) * noise_stddev
        else:
            logits = clean_logits
        top_logits, top_indices = logits.topk(min(self.k + 1, self.num_experts), dim=1)
        top_k_logits, top_k_indices = top_logits[:, : self.k], top_indices[:, : self.k]
        top_k_gates = self.softmax(top_k_logits)
        zeros = torch.zeros_like(logits, requires_grad=True)
        return zeros.scatter(1, top_k_indices, top_k_gates)

    def forward(self, x):
        gates = self.noisy_top_k_gating(x, self.training)
        self.aux_loss = self.cv_squared(gates.sum(0))
        return torch.stack([gates[:, i : i + 1] * e(x) for i, e in enumerate(self.experts)]).sum(0)


class SparseMoeBlock(nn.Module):
    """Each expert takes the tokens that chose it, by index, and adds what it makes of them."""

    def __init__(self, dim: int = 6, num_experts: int = 3, top_k: int = 2):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, dim)) for _ in range(3)])

    def forward(self, hidden_states):
        hidden_dim = hidden_states.shape[-1]
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
        final = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current = self.experts[expert_idx](current_state) * routing_weights[top_x, idx, None]
            final.index_add_(0, top_x, current)
        return final.reshape(shape)


class BooleanMoE(nn.Module):
    """The same by boolean masks, one expert a token, skipping those that have none."""

    def __init__(self, dim: int = 6, num_experts: int = 3):
        super().__init__()
        self.gate = nn.Linear(dim, num_experts)
        self.experts = nn.ModuleList([nn.Linear(dim, dim) for _ in range(num_experts)])

    def forward(self, x):
        scores, chosen = self.gate(x).softmax(-1).max(dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if mask.any():
                out[mask] = expert(x[mask]) * scores[mask].unsqueeze(-1)
        return out


class SwitchMoE(nn.Module):
    """One expert a token with a capacity, by one-hot dispatch; and the loss that balances them."""

    def __init__(self, dim: int = 6, num_experts: int = 3, capacity: int = 4):
        super().__init__()
        self.num_experts, self.capacity, self.router = num_experts, capacity, nn.Linear(dim, num_experts)
        self.w1 = nn.Parameter(torch.randn(num_experts, dim, 8) * 0.4)
        self.w2 = nn.Parameter(torch.randn(num_experts, 8, dim) * 0.4)
        self.aux_loss = None

    def forward(self, x):
        raw_gates = self.router(x).softmax(dim=-1)
        gate_1, index_1 = raw_gates.max(dim=-1)
        mask_1 = F.one_hot(index_1, self.num_experts).to(x.dtype)
        density, density_proxy = mask_1.mean(dim=-2), raw_gates.mean(dim=-2)
        self.aux_loss = (density_proxy * density).mean() * float(self.num_experts**2)
        position = (mask_1.cumsum(dim=-2) - 1) * mask_1
        mask_1 = mask_1 * (position < self.capacity).to(x.dtype)
        slots = F.one_hot((position * mask_1).sum(-1).long(), self.capacity).to(x.dtype)
        combine = gate_1[..., None, None] * mask_1.unsqueeze(-1) * slots.unsqueeze(-2)
        dispatch = combine.bool().to(combine)
        inputs = torch.einsum("bnd,bnec->ebcd", x, dispatch)
        hidden = F.gelu(torch.einsum("ebcd,edh->ebch", inputs, self.w1))
        outputs = torch.einsum("ebch,ehd->ebcd", hidden, self.w2)
        return torch.einsum("ebcd,bnec->bnd", outputs, combine)


class OverTokens(nn.Module):
    """A block for sequences between a first layer and the mean."""

    def __init__(self, block: nn.Module, inner: int = 4, width: int = 6):
        super().__init__()
        self.first, self.block, self.head = nn.Linear(inner, width), block, nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.first(x)
        return self.head((h + self.block(h)).mean(1))


EXPERTS = {
    "soft mixture of experts": Case(lambda: mlp(nn.Tanh(), SoftMoE()), features()),
    "noisy top-k gates": Case(lambda: mlp(nn.Tanh(), NoisyTopKMoE()), features(), cost_of=with_aux()),
    "experts by index, kept whole": Case(
        lambda: OverTokens(SparseMoeBlock()), features(3, 4), leaves=(SparseMoeBlock,)
    ),
    "experts by index": Case(
        lambda: OverTokens(SparseMoeBlock()), features(3, 4)
    ),
    "experts by mask, kept whole": Case(lambda: mlp(nn.Tanh(), BooleanMoE()), features(), leaves=(BooleanMoE,)),
    "experts by mask": Case(
        lambda: mlp(nn.Tanh(), BooleanMoE()), features(), verdict="refused", place=r"if mask\.any\(\)"
    ),
    "switch with capacity": Case(lambda: OverTokens(SwitchMoE()), features(5, 4), cost_of=with_aux()),
}  # fmt: skip


# What is dropped at random.


def drop_path(x, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True):
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        random_tensor.div_(keep_prob)
    return x * random_tensor


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training)


class FloorDropPath(DropPath):
    """As it was written before: by rounding down."""

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        random_tensor = keep_prob + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        random_tensor.floor_()
        return x.div(keep_prob) * random_tensor


class Stochastic(nn.Module):
    """Layers that are skipped for some examples."""

    def __init__(self, drop: Callable[[float], nn.Module]):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        rates = [x.item() for x in torch.linspace(0, 0.5, 3)]
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in rates])
        self.drops = nn.ModuleList([drop(rate) if rate > 0 else nn.Identity() for rate in rates])

    def forward(self, x):
        x = self.first(x)
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x = x + drop(block(x))
        return self.head(x)


class CoinBlock(nn.Module):
    """A coin of Python's decides for the whole batch."""

    def __init__(self, rate: float = 0.5):
        super().__init__()
        self.rate, self.inner = rate, nn.Linear(6, 6)

    def forward(self, x):
        if self.training and torch.rand(1).item() < self.rate:
            return x
        return x + torch.tanh(self.inner(x))


class DropBlock2D(nn.Module):
    def __init__(self, drop_prob: float = 0.3, block_size: int = 3):
        super().__init__()
        self.drop_prob, self.block_size = drop_prob, block_size

    def forward(self, x):
        assert x.dim() == 4, "expected input with 4 dimensions (bsize, channels, height, width)"
        if not self.training or self.drop_prob == 0.0:
            return x
        gamma = self.drop_prob / (self.block_size**2)
        mask = (torch.rand(x.shape[0], *x.shape[2:]) < gamma).to(x.dtype)
        block_mask = F.max_pool2d(
            input=mask[:, None, :, :], kernel_size=(self.block_size, self.block_size), stride=(1, 1),
            padding=self.block_size // 2,
        )  # fmt: skip
        block_mask = 1 - block_mask.squeeze(1)
        out = x * block_mask[:, None, :, :]
        return out * block_mask.numel() / block_mask.sum()


class MonteCarloDropout(nn.Module):
    """The mean of several draws of dropout, in every mode."""

    def __init__(self, samples: int = 3):
        super().__init__()
        self.fc1, self.fc2, self.samples = nn.Linear(4, 6), nn.Linear(6, CLASSES), samples

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        draws = [self.fc2(F.dropout(h, p=0.3, training=True)) for _ in range(self.samples)]
        return torch.stack(draws, dim=0).mean(dim=0)


class WeightDropLSTM(nn.Module):
    """Variational dropout: one mask for all time steps, and embeddings dropped as whole words."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rnn, self.head = nn.Embedding(7, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, CLASSES)

    def locked(self, x, p=0.3):
        if not self.training or not p:
            return x
        m = x.data.new(x.size(0), 1, x.size(2)).bernoulli_(1 - p)
        return m.div_(1 - p).expand_as(x) * x

    def embedded(self, words, p=0.2):
        weight = self.encoder.weight
        mask = weight.data.new().resize_((weight.size(0), 1)).bernoulli_(1 - p).expand_as(weight) / (1 - p)
        return F.embedding(words, mask * weight, -1 if self.encoder.padding_idx is None else self.encoder.padding_idx)

    def forward(self, words):
        out, _ = self.rnn(self.locked(self.embedded(words)))
        return self.head(self.locked(out)[:, -1])


def words(length: int = 5, vocabulary: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, (BATCH, length))


DROPPED = {
    "drop path": Case(lambda: Stochastic(DropPath), features()),
    "drop path by floor": Case(lambda: Stochastic(FloorDropPath), features()),
    "stochastic depth of the batch": Case(
        lambda: mlp(CoinBlock(0.3), CoinBlock(0.3)), features(), verdict="refused", place=r"torch\.rand\(1\)\.item\(\)"
    ),
    "stochastic depth of the batch, kept whole": Case(
        lambda: mlp(CoinBlock(0.3), CoinBlock(0.3)), features(), leaves=(CoinBlock,)
    ),
    "drop block": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), DropBlock2D(), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 3)
        ),
        features(1, 4, 4),
    ),
    "Monte Carlo dropout": Case(MonteCarloDropout, features()),
    "dropout of words and locked dropout": Case(WeightDropLSTM, words(), verdict="refused", place="WeightDropLSTM"),
}  # fmt: skip


# Tied weights, gates, and weights that are computed.


class TiedAutoencoder(nn.Module):
    def __init__(self, dim: int = 4, hidden: int = 6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.enc_bias, self.dec_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x):
        z = torch.sigmoid(F.linear(x, self.weight, self.enc_bias))
        return F.linear(z, self.weight.t(), self.dec_bias)


class Symmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).transpose(-1, -2)


class MatrixExponential(nn.Module):
    def forward(self, X):
        A = X.triu(1) - X.triu(1).transpose(-1, -2)
        return torch.matrix_exp(A)


def symmetric_layers() -> nn.Module:
    model = mlp(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    parametrize.register_parametrization(model[4], "weight", Symmetric())
    parametrize.register_parametrization(model[4], "weight", MatrixExponential())
    return model


def shared_layer() -> nn.Module:
    """One parameter in two modules."""
    model = mlp(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    model[4].weight = model[2].weight
    return model


class Highway(nn.Module):
    def __init__(self, size: int = 6, num_layers: int = 2):
        super().__init__()
        self.num_layers = num_layers
        self.nonlinear = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.linear = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.gate = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])

    def forward(self, x):
        for layer in range(self.num_layers):
            gate = torch.sigmoid(self.gate[layer](x))
            nonlinear = F.relu(self.nonlinear[layer](x))
            linear = self.linear[layer](x)
            x = gate * nonlinear + (1 - gate) * linear
        return x


class SEBlock(nn.Module):
    def __init__(self, channel: int = 4, reduction: int = 2):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class CBAM(nn.Module):
    """Channel attention from mean and maximum, then spatial attention."""

    def __init__(self, planes: int = 4):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(planes, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, planes, 1, bias=False))
        self.conv1 = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)) + self.fc(F.adaptive_max_pool2d(x, 1))) * x
        pooled = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return torch.sigmoid(self.conv1(pooled)) * x


class CustomLSTM(nn.Module):
    """All gates from two matrices, in a loop over time."""

    def __init__(self, input_sz: int = 4, hidden_sz: int = 5):
        super().__init__()
        self.hidden_size = hidden_sz
        self.W = nn.Parameter(torch.Tensor(input_sz, hidden_sz * 4))
        self.U = nn.Parameter(torch.Tensor(hidden_sz, hidden_sz * 4))
        self.bias = nn.Parameter(torch.Tensor(hidden_sz * 4))
        for weight in self.parameters():
            weight.data.uniform_(-0.5, 0.5)

    def forward(self, x, init_states=None):
        bs, seq_sz, _ = x.size()
        hidden_seq = []
        if init_states is None:
            h_t, c_t = (
                torch.zeros(bs, self.hidden_size).to(x),
                torch.zeros(bs, self.hidden_size).to(x),
            )
        else:
            h_t, c_t = init_states
        HS = self.hidden_size
        for t in range(seq_sz):
            gates = x[:, t, :] @ self.W + h_t @ self.U + self.bias
            i_t, f_t, g_t, o_t = (
                torch.sigmoid(gates[:, :HS]),
                torch.sigmoid(gates[:, HS : HS * 2]),
                torch.tanh(gates[:, HS * 2 : HS * 3]),
                torch.sigmoid(gates[:, HS * 3 :]),
            )
            c_t = f_t * c_t + i_t * g_t
            h_t = o_t * torch.tanh(c_t)
            hidden_seq.append(h_t.unsqueeze(0))
        hidden_seq = torch.cat(hidden_seq, dim=0).transpose(0, 1).contiguous()
        return hidden_seq, (h_t, c_t)


class LastOf(nn.Module):
    """The last output of a recurrent layer, classified."""

    def __init__(self, rnn: nn.Module, width: int = 5):
        super().__init__()
        self.rnn, self.fc = rnn, nn.Linear(width, CLASSES)

    def forward(self, x):
        out = self.rnn(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.fc(out[:, -1, :])


class HandGRUCell(nn.Module):
    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.x2h, self.h2h = nn.Linear(input_size, 3 * hidden_size), nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x, hidden):
        gate_x, gate_h = self.x2h(x).squeeze(), self.h2h(hidden).squeeze()
        i_r, i_i, i_n = gate_x.chunk(3, 1)
        h_r, h_i, h_n = gate_h.chunk(3, 1)
        resetgate, inputgate = torch.sigmoid(i_r + h_r), torch.sigmoid(i_i + h_i)
        newgate = torch.tanh(i_n + (resetgate * h_n))
        return newgate + inputgate * (hidden - newgate)


class HandGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru_cell = HandGRUCell(4, 5)

    def forward(self, x):
        hn, outs = x.new_zeros(x.size(0), 5), []
        for seq in range(x.size(1)):
            hn = self.gru_cell(x[:, seq, :], hn)
            outs.append(hn)
        return torch.stack(outs, 1)


class SRU(nn.Module):
    """All matrix products at once; the recurrence is elementwise and writes into a prepared tensor."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.proj, self.linear = nn.Linear(4, width), nn.Linear(width, 3 * width, bias=False)
        self.v, self.b = nn.Parameter(torch.rand(2, width) - 0.5), nn.Parameter(torch.zeros(2, width))

    def forward(self, x):
        x = self.proj(x)
        u0, u1, u2 = self.linear(x).chunk(3, dim=-1)
        c = x.new_zeros(x.shape[0], x.shape[2])
        h = x.new_empty(x.shape)
        for t in range(x.shape[1]):
            forget = torch.sigmoid(u1[:, t] + self.v[0] * c + self.b[0])
            reset = torch.sigmoid(u2[:, t] + self.v[1] * c + self.b[1])
            c = forget * c + (1 - forget) * u0[:, t]
            h[:, t] = reset * torch.tanh(c) + (1 - reset) * x[:, t]
        return h


class HyperLinear(nn.Module):
    """Weights made by a small network from an embedding of the layer."""

    def __init__(self, z_dim: int = 3, inner: int = 6, outer: int = 6):
        super().__init__()
        self.inner, self.outer, self.z = inner, outer, nn.Parameter(torch.randn(z_dim))
        self.hyper = nn.Sequential(nn.Linear(z_dim, 5), nn.Tanh(), nn.Linear(5, inner * outer + outer))

    def forward(self, x):
        made = self.hyper(self.z)
        w, b = made[: self.inner * self.outer].view(self.outer, self.inner), made[self.inner * self.outer :]
        return F.linear(x, w, b)


class ConditionalHyper(nn.Module):
    """Weights made for every example, as in a dynamic filter."""

    def __init__(self):
        super().__init__()
        self.hyper, self.body, self.head = nn.Linear(2, 6 * 6), nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x, context):
        w = self.hyper(context).view(-1, 6, 6)
        h = torch.bmm(w, torch.tanh(self.body(x)).unsqueeze(-1)).squeeze(-1)
        return self.head(torch.relu(h))


class DynamicConv(nn.Module):
    """Attention over kernels, applied as one grouped convolution of the batch."""

    def __init__(self, inner: int = 2, outer: int = 3, K: int = 2):
        super().__init__()
        self.K, self.outer = K, outer
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, K), nn.Softmax(1))
        self.weight = nn.Parameter(torch.randn(K, outer, inner, 3, 3) * 0.3)
        self.fc = nn.Linear(outer, CLASSES)

    def forward(self, x):
        a = self.attention(x)
        bs, c, h, w = x.size()
        weight = torch.mm(a, self.weight.view(self.K, -1)).view(bs * self.outer, c, 3, 3)
        out = F.conv2d(x.reshape(1, -1, h, w), weight, padding=1, groups=bs).view(bs, self.outer, h, w)
        return self.fc(F.relu(out).mean((2, 3)))


class BilinearGLU(nn.Module):
    """`F.glu`, and a gate that reads the input twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(6, 12), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = F.glu(self.a(x), dim=-1)
        u, v = self.b(h).chunk(2, dim=-1)
        return self.c(h + u * F.gelu(v))


TIED = {
    "tied autoencoder": Case(TiedAutoencoder, features(), lambda x: x, "mse"),
    "parametrisations": Case(symmetric_layers, features()),
    "one parameter in two modules": Case(shared_layer, features()),
    "gated linear units": Case(BilinearGLU, features()),
    "highway": Case(lambda: mlp(Highway()), features()),
    "squeeze and excite": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), SEBlock(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        features(2, 4, 4),
    ),
    "block attention": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), CBAM(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), features(2, 4, 4)
    ),
    "LSTM by hand": Case(lambda: LastOf(CustomLSTM()), features(3, 4)),
    "GRU by hand": Case(lambda: LastOf(HandGRU()), features(3, 4)),
    "simple recurrent unit": Case(lambda: LastOf(SRU()), features(4, 4)),
    "hypernetwork": Case(lambda: mlp(nn.Tanh(), HyperLinear(), nn.Tanh()), features()),
    "hypernetwork of the input": Case(ConditionalHyper, lambda: (torch.randn(BATCH, 4), torch.randn(BATCH, 2))),
    "dynamic convolution": Case(DynamicConv, features(2, 4, 4)),
}  # fmt: skip


# Adapters: a frozen base, and few parameters that are trained.


class LoRALinear(nn.Module):
    """A low-rank change of a frozen layer."""

    def __init__(self, base: nn.Linear, r: int = 2, alpha: float = 4.0, dropout: float = 0.1):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / r, nn.Dropout(dropout)
        self.lora_A = nn.Parameter(base.weight.new_zeros((r, base.in_features)))
        self.lora_B = nn.Parameter(0.1 * torch.randn(base.out_features, r))
        for p in self.base.parameters():
            p.requires_grad = False
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return (
            self.base(x) + (self.dropout(x) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        )


def with_lora(model: nn.Module) -> nn.Module:
    """Every linear layer is replaced; the head stays trained."""
    for name, child in list(model.named_children())[:-1]:
        if isinstance(child, nn.Linear):
            setattr(model, name, LoRALinear(child))
    return model


class DoRALinear(nn.Module):
    """Direction and size apart; the norm passes no gradient."""

    def __init__(self, inner: int = 6, outer: int = 6, rank: int = 2):
        super().__init__()
        self.register_buffer("weight", torch.randn(outer, inner) / 2)
        self.m = nn.Parameter(self.weight.norm(p=2, dim=0, keepdim=True))
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.randn(rank, inner) / 2),
            nn.Parameter(0.1 * torch.randn(outer, rank)),
        )

    def forward(self, x):
        adapted = self.weight + self.lora_B @ self.lora_A
        norm = adapted.norm(p=2, dim=0, keepdim=True).detach()
        return F.linear(x, self.m * adapted / norm)


class Adapter(nn.Module):
    def __init__(self, d_model: int = 6, bottleneck: int = 2):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(d_model, bottleneck), nn.Linear(bottleneck, d_model)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.up_proj.weight, std=0.1)

    def forward(self, x, add_residual=True, residual=None):
        residual = x if residual is None else residual
        up = self.up_proj(F.relu(self.down_proj(x))) * self.scale
        return up + residual if add_residual else up


class AdaptedBackbone(nn.Module):
    """Features under no_grad from a network in eval mode; what comes behind is trained."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6))
        self.adapter, self.fc = Adapter(), nn.Linear(6, CLASSES)
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.fc(torch.tanh(self.adapter(features)))


class PrefixTuning(nn.Module):
    """Trained keys and values before those of a frozen attention, and a trained prompt before the input."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.embed, self.q, self.kv = nn.Embedding(7, dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.requires_grad_(False)
        self.prompt, self.prefix = nn.Parameter(torch.randn(2, dim)), nn.Parameter(torch.randn(2, 3, dim))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, tokens):
        b = tokens.shape[0]
        x = torch.cat([self.prompt.unsqueeze(0).repeat(b, 1, 1), self.embed(tokens)], dim=1)
        k, v = self.kv(x).chunk(2, -1)
        k = torch.cat([self.prefix[0].expand(b, -1, -1), k], dim=1)
        v = torch.cat([self.prefix[1].expand(b, -1, -1), v], dim=1)
        x = x + F.scaled_dot_product_attention(self.q(x), k, v)
        return self.head(x.mean(1))


class Ladder(nn.Module):
    """A side network reads the detached states of a frozen one, mixed by gates with a temperature."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)]).requires_grad_(False)
        self.down = nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])
        self.side = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(3)])
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        s = None
        for base, down, side, gate in zip(self.base, self.down, self.side, self.gates, strict=True):
            x = torch.tanh(base(x))
            h = down(x.detach())
            mu = torch.sigmoid(gate / 0.1)
            s = h if s is None else mu * h + (1 - mu) * s
            s = s + torch.tanh(side(s))
        return self.head(s)


ADAPTERS = {
    "LoRA": Case(
        lambda: with_lora(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))),
        features(),
    ),
    "DoRA": Case(lambda: mlp(nn.Tanh(), DoRALinear(), nn.Tanh()), features()),
    "adapter on a backbone in eval mode": Case(AdaptedBackbone, features()),
    "prefixes and prompts": Case(PrefixTuning, lambda: torch.randint(7, (BATCH, 3))),
    "ladder beside a frozen network": Case(Ladder, features()),
}  # fmt: skip


# Physics: derivatives in the loss or in forward.


class HeatNet(nn.Module):
    """A solution and its derivatives by central differences."""

    def __init__(self, h: float = 0.2):
        super().__init__()
        self.net, self.h = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)), h
        self.nu = nn.Parameter(torch.tensor(0.5))

    def forward(self, tx):
        h, e = self.h, torch.eye(2, dtype=tx.dtype)
        u = self.net(tx)
        u_t = (self.net(tx + h * e[0]) - self.net(tx - h * e[0])) / (2 * h)
        u_xx = (self.net(tx + h * e[1]) - 2 * u + self.net(tx - h * e[1])) / h**2
        return u, u_t - self.nu * u_xx


def heat_cost(output, target):
    u, residual = output
    return ((u - target) ** 2).mean() + 0.1 * (residual**2).mean()


class JvpNet(nn.Module):
    """The same with forward-mode derivatives."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, tx):
        v = torch.zeros_like(tx)
        v[:, 0] = 1.0
        u, u_t = torch.func.jvp(self.net, (tx,), (v,))
        return u, u_t + u


class GradNet(nn.Module):
    """Derivatives by `torch.autograd.grad`, which are trained."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, tx):
        with torch.enable_grad():
            tx = tx.clone().requires_grad_(True)
            u = self.net(tx)
            du = torch.autograd.grad(u, tx, grad_outputs=torch.ones_like(u), create_graph=True, retain_graph=True)[0]
        return torch.cat([u, du[:, 0:1] + u * du[:, 1:2]], dim=1)


class Hamiltonian(nn.Module):
    """The symplectic gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))
        self.register_buffer("J", torch.eye(4)[[2, 3, 0, 1]] * torch.tensor([1.0, 1.0, -1.0, -1.0]))

    def forward(self, x):
        dH = torch.func.vmap(torch.func.grad(lambda z: self.energy(z).squeeze()))(x)
        return dH @ self.J.t()


class HandGradient(nn.Module):
    """The same, its derivative written out, as for a network of one layer; and a time step of leapfrog."""

    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(2, 6), nn.Linear(6, 1, bias=False)

    def force(self, q):
        s = torch.tanh(self.lin(q))
        return -((1 - s**2) * self.out.weight) @ self.lin.weight

    def forward(self, state, dt=0.1):
        q, p = state.chunk(2, dim=-1)
        for _ in range(2):
            p = p + 0.5 * dt * self.force(q)
            q = q + dt * p
            p = p + 0.5 * dt * self.force(q)
        return torch.cat((q, p), -1)


def residual_of_model(model):
    """A cost that runs the model again, at points beside those of the target."""

    def cost(output, target):
        h = 0.2
        points, values = target[:, :2], target[:, 2:]
        slope = (model(points + h)[0] - model(points - h)[0]) / (2 * h)
        return (output[0] - values).square().mean(1) + 0.1 * (slope + output[0]).square().mean(1)

    return cost


PHYSICS = {
    "finite differences": Case(HeatNet, features(2), numbers(1), heat_cost),
    "the model again in its cost": Case(HeatNet, features(2), numbers(3), cost_of=residual_of_model),
    "forward-mode derivatives": Case(JvpNet, features(2), numbers(1), heat_cost),
    "derivatives by autograd": Case(GradNet, features(2), numbers(2), "mse", verdict="refused", place="GradNet"),
    "derivatives by autograd, kept whole": Case(
        lambda: nn.Sequential(nn.Linear(4, 2), GradNet()), features(), numbers(2), "mse", leaves=(GradNet,)
    ),
    "gradient of an energy by vmap": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), Hamiltonian()), features(), numbers(4), "mse", verdict="refused",
        place=r"torch\.func\.vmap.*`1` whole",
    ),
    "gradient of an energy by vmap, kept whole": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), Hamiltonian()), features(), numbers(4), "mse", leaves=(Hamiltonian,)
    ),
    "gradient of an energy by hand": Case(HandGradient, features(), numbers(4), "mse"),
}  # fmt: skip


# Graphs: dense adjacency, and lists of edges.


class GraphConvolution(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(in_features, out_features)),
            nn.Parameter(torch.empty(out_features)),
        )
        stdv = 1.0 / math.sqrt(out_features)
        self.weight.data.uniform_(-stdv, stdv)
        self.bias.data.uniform_(-stdv, stdv)

    def forward(self, input, adj):
        support = torch.matmul(input, self.weight)
        return torch.matmul(adj, support) + self.bias


class GCN(nn.Module):
    """Several graphs a batch, each with its normalised adjacency."""

    def __init__(self):
        super().__init__()
        self.gc1, self.gc2, self.fc = GraphConvolution(4, 6), GraphConvolution(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x, adj):
        adj = adj + torch.eye(adj.size(-1), dtype=adj.dtype)
        degree = adj.sum(-1).clamp(min=1).pow(-0.5)
        adj = degree.unsqueeze(-1) * adj * degree.unsqueeze(-2)
        x = F.relu(self.gc1(x, adj))
        x = F.dropout(x, 0.2, training=self.training)
        return self.fc(F.relu(self.gc2(x, adj)).mean(1))


class NodeGCN(nn.Module):
    """One graph: its nodes are the examples, and classify as in Cora."""

    def __init__(self):
        super().__init__()
        self.gc1, self.gc2 = GraphConvolution(4, 6), GraphConvolution(6, CLASSES)
        adj = (torch.rand(BATCH, BATCH) < 0.5).float() + torch.eye(BATCH)
        self.register_buffer("adj", adj / adj.sum(1, keepdim=True))

    def forward(self, x):
        return F.log_softmax(self.gc2(F.relu(self.gc1(x, self.adj)), self.adj), dim=1)


class GraphAttentionLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, alpha: float = 0.2, concat: bool = True):
        super().__init__()
        self.out_features, self.concat = out_features, concat
        self.W = nn.Parameter(torch.empty(size=(in_features, out_features)))
        self.a = nn.Parameter(torch.empty(size=(2 * out_features, 1)))
        nn.init.xavier_uniform_(self.W.data, gain=1.414)
        nn.init.xavier_uniform_(self.a.data, gain=1.414)
        self.leakyrelu = nn.LeakyReLU(alpha)

    def forward(self, h, adj):
        Wh = torch.matmul(h, self.W)
        Wh1 = torch.matmul(Wh, self.a[: self.out_features, :])
        Wh2 = torch.matmul(Wh, self.a[self.out_features :, :])
        e = self.leakyrelu(Wh1 + Wh2.transpose(-1, -2))
        zero_vec = -9e15 * torch.ones_like(e)
        attention = torch.where(adj > 0, e, zero_vec)
        attention = F.softmax(attention, dim=-1)
        h_prime = torch.matmul(attention, Wh)
        return F.elu(h_prime) if self.concat else h_prime


class GAT(nn.Module):
    def __init__(self, nheads: int = 2):
        super().__init__()
        self.attentions = [GraphAttentionLayer(4, 3) for _ in range(nheads)]
        for i, attention in enumerate(self.attentions):
            self.add_module(f"attention_{i}", attention)
        self.out_att = GraphAttentionLayer(3 * nheads, CLASSES, concat=False)

    def forward(self, x, adj):
        x = torch.cat([att(x, adj) for att in self.attentions], dim=-1)
        return F.elu(self.out_att(x, adj)).mean(1)


def graphs(nodes: int = 4) -> tuple[Tensor, Tensor]:
    adj = (torch.rand(BATCH, nodes, nodes) < 0.5).float()
    return torch.randn(BATCH, nodes, 4), ((adj + adj.transpose(1, 2)) > 0).float()


EDGES = torch.tensor([[0, 1, 1, 2, 3, 3, 0], [1, 0, 2, 1, 0, 2, 3]])


class MessagePassing(nn.Module):
    """Messages along a fixed list of edges, added up with `index_add_`."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.register_buffer("edge_index", EDGES)
        self.encode, self.message, self.update = nn.Linear(4, dim), nn.Linear(2 * dim, dim), nn.GRUCell(dim, dim)
        self.readout = nn.Linear(dim, CLASSES)

    def forward(self, x):
        b, n, _ = x.shape
        src, dst = self.edge_index
        h = self.encode(x)
        for _ in range(2):
            m = F.relu(self.message(torch.cat([h[:, src], h[:, dst]], dim=-1)))
            agg = torch.zeros_like(h).index_add_(1, dst, m)
            h = self.update(agg.reshape(b * n, -1), h.reshape(b * n, -1)).view(b, n, -1)
        return self.readout(h.sum(dim=1))


class BatchedEdges(nn.Module):
    """One large graph of all examples: edges and membership are inputs."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.lin_l, self.lin_r, self.edge, self.out = (
            nn.Linear(4, dim),
            nn.Linear(4, dim),
            nn.Linear(2, dim),
            nn.Linear(dim, 3),
        )

    def forward(self, x, edge_index, edge_attr):
        src, dst = edge_index[0], edge_index[1]
        messages = torch.relu(self.lin_l(x)[src] + self.edge(edge_attr))
        agg = torch.zeros(x.size(0), messages.size(1), dtype=x.dtype)
        agg = agg.scatter_add_(0, dst.unsqueeze(-1).expand_as(messages), messages)
        count = torch.zeros(x.size(0), dtype=x.dtype).scatter_add_(0, dst, torch.ones(dst.size(0), dtype=x.dtype))
        return self.out(torch.tanh(agg / count.clamp(min=1).unsqueeze(-1) + self.lin_r(x)))


class EGNN(nn.Module):
    """Equivariant: messages from squared distances, and coordinates that move."""

    def __init__(self, dim: int = 5):
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.edge_mlp = nn.Sequential(nn.Linear(2 * dim + 1, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.coord_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1, bias=False))
        self.node_mlp, self.head = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU()), nn.Linear(dim, CLASSES)

    def forward(self, feats, coors):
        h = self.embed(feats)
        for _ in range(2):
            rel = coors.unsqueeze(2) - coors.unsqueeze(1)
            dist = (rel**2).sum(dim=-1, keepdim=True)
            n = h.shape[1]
            pair = torch.cat([h.unsqueeze(2).expand(-1, -1, n, -1), h.unsqueeze(1).expand(-1, n, -1, -1), dist], dim=-1)
            m = self.edge_mlp(pair)
            coors = coors + 0.1 * torch.einsum("bijc,bij->bic", rel, self.coord_mlp(m).squeeze(-1))
            h = h + self.node_mlp(torch.cat([h, m.sum(dim=2)], dim=-1))
        return self.head(h.mean(1) + coors.square().sum((1, 2)).unsqueeze(-1))


class SegmentSoftmax(nn.Module):
    """Attention over the edges of each node: `scatter_reduce` for the maximum, `index_add` for the sum."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.register_buffer("edges", EDGES)
        self.lin, self.att, self.head = nn.Linear(4, dim), nn.Parameter(torch.randn(dim, 1)), nn.Linear(dim, CLASSES)

    def forward(self, x):
        src, dst = self.edges
        h = self.lin(x)
        alpha = F.leaky_relu((h[:, src] + h[:, dst]) @ self.att, 0.2).squeeze(-1)
        index = dst.expand_as(alpha)
        top = torch.full(x.shape[:2], float("-inf"), dtype=x.dtype).scatter_reduce(1, index, alpha, "amax")
        exp = (alpha - top.detach().gather(1, index)).exp()
        total = torch.zeros(x.shape[:2], dtype=x.dtype).index_add(1, dst, exp)
        weight = exp / (total.gather(1, index) + 1e-16)
        out = torch.zeros_like(h).index_add(1, dst, h[:, src] * weight.unsqueeze(-1))
        return self.head(torch.tanh(out).amax(dim=1))


GRAPHS = {
    "graph convolution": Case(GCN, graphs),
    "graph convolution, nodes as examples": Case(
        NodeGCN, features(), cost=lambda o, y: F.nll_loss(o, y, reduction="none")
    ),
    "graph attention": Case(GAT, graphs),
    "messages by index_add": Case(MessagePassing, features(4, 4)),
    "messages by scatter_add": Case(BatchedEdges, lambda: (torch.randn(BATCH, 4), EDGES, torch.randn(7, 2))),
    "equivariant messages": Case(EGNN, lambda: (torch.randn(BATCH, 3, 4), torch.randn(BATCH, 3, 3))),
    "softmax over edges": Case(SegmentSoftmax, features(4, 4)),
}  # fmt: skip


# Attention.


class MultiQuery(nn.Module):
    """One head of keys and values for all queries, with rotary positions and a causal mask."""

    def __init__(self, dim: int = 8, heads: int = 2):
        super().__init__()
        self.heads, self.d = heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = nn.Linear(dim, self.d, bias=False), nn.Linear(dim, self.d, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, self.d, 2).float() / self.d))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @staticmethod
    def rotate_half(x):
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.d).transpose(1, 2)
        k, v = self.wk(x).unsqueeze(1), self.wv(x).unsqueeze(1)
        freqs = torch.einsum("i,j->ij", torch.arange(t, dtype=self.inv_freq.dtype), self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos(), emb.sin()
        q, k = q * cos + self.rotate_half(q) * sin, k * cos + self.rotate_half(k) * sin
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.d)
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype)
        scores = scores + torch.triu(mask, diagonal=1)
        return self.wo(torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).reshape(b, t, -1))


class ComplexRotary(nn.Module):
    """Rotary positions by complex products, and grouped keys repeated."""

    def __init__(self, dim: int = 8, heads: int = 4, kv_heads: int = 2, length: int = 8):
        super().__init__()
        self.heads, self.kv_heads, self.d = heads, kv_heads, dim // heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wkv = nn.Linear(dim, 2 * kv_heads * self.d, bias=False)
        freqs = 1.0 / (100.0 ** (torch.arange(0, self.d, 2).double() / self.d))
        freqs = torch.outer(torch.arange(length).double(), freqs)
        self.freqs_cis = torch.polar(torch.ones_like(freqs), freqs)

    def rotated(self, x):
        x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        freqs_cis = self.freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(x_ * freqs_cis).flatten(3).type_as(x)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.rotated(self.wq(x).view(b, t, self.heads, self.d))
        k, v = self.wkv(x).view(b, t, 2, self.kv_heads, self.d).unbind(2)
        k = self.rotated(k)[:, :, :, None, :].expand(b, t, self.kv_heads, 2, self.d).reshape(b, t, self.heads, self.d)
        v = torch.repeat_interleave(v, dim=2, repeats=2)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(b, t, -1))


class ALiBi(nn.Module):
    def __init__(self, dim: int = 6, heads: int = 2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])
        self.register_buffer("slopes", slopes.view(heads, 1, 1))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        position = torch.arange(t)
        bias = -(position[None, :] - position[:, None]).abs() * self.slopes
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
        causal = torch.ones(t, t, dtype=torch.bool).triu(1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(-1), v)
        return self.out(out.transpose(1, 2).reshape(b, t, d))


class WindowAttention(nn.Module):
    """Swin: windows, shifted by rolling, with a table of relative biases."""

    def __init__(self, dim: int = 6, window: int = 2, heads: int = 2, shift: int = 1):
        super().__init__()
        self.window_size, self.num_heads, self.shift = window, heads, shift
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(0.5 * torch.randn((2 * window - 1) ** 2, heads))
        coords = torch.stack(torch.meshgrid([torch.arange(window), torch.arange(window)], indexing="ij"))
        flat = torch.flatten(coords, 1)
        relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        self.qkv, self.proj, self.softmax = nn.Linear(dim, dim * 3), nn.Linear(dim, dim), nn.Softmax(dim=-1)

    def forward(self, x):
        B, H, W, C = x.shape
        w = self.window_size
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, C)
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(w * w, w * w, -1)
        attn = self.softmax(attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0))
        x = self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C))
        x = x.view(B, H // w, W // w, w, w, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Conv2d(1, 6, 1), WindowAttention(), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.embed(x).permute(0, 2, 3, 1)
        return self.head((h + self.attention(h)).mean((1, 2)))


class LinearAttention(nn.Module):
    """Features of keys summed up over the past."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        kv = torch.cumsum(torch.einsum("btd,bte->btde", k, v), dim=1)
        z = 1 / (torch.einsum("btd,btd->bt", q, k.cumsum(1)) + 1e-6)
        return torch.einsum("btd,btde,bt->bte", q, kv, z)


class LocalAttention(nn.Module):
    """Each position sees a window, by `unfold`."""

    def __init__(self, dim: int = 6, window: int = 3):
        super().__init__()
        self.window, self.to_qkv = window, nn.Linear(dim, 3 * dim)
        self.rel = nn.Parameter(torch.randn(dim, window) * 0.1)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1)
        pad = self.window // 2
        k, v = (F.pad(a, (0, 0, pad, pad)).unfold(1, self.window, 1) for a in (k, v))
        sim = torch.einsum("btd,btdw->btw", q, k + self.rel) / math.sqrt(q.shape[-1])
        outside = torch.ones(1, x.shape[1], dtype=x.dtype)
        outside = F.pad(outside, (pad, pad)).unfold(1, self.window, 1) == 0
        return torch.einsum("btw,btdw->btd", sim.masked_fill(outside, -1e9).softmax(-1), v)


class CrossAttention(nn.Module):
    """A decoder layer: queries of one sequence, keys and values of another, whose padding is masked."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.src, self.tgt = nn.Embedding(7, dim), nn.Embedding(7, dim)
        self.layer = nn.TransformerDecoderLayer(dim, 2, 8, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(dim, 7)

    def forward(self, src, tgt, src_key_padding_mask):
        tgt_mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
        memory = self.src(src)
        out = self.layer(self.tgt(tgt), memory, tgt_mask=tgt_mask.to(memory.dtype),
                         memory_key_padding_mask=src_key_padding_mask)  # fmt: skip
        return self.generator(out).transpose(1, 2)


class Perceiver(nn.Module):
    """Latents that are parameters read the input again and again, with shared weights."""

    def __init__(self, dim: int = 6, latents: int = 3):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.kv, self.q, self.mix = nn.Linear(4, 2 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, data):
        x = self.latents.unsqueeze(0).expand(data.shape[0], -1, -1)
        for _ in range(2):
            k, v = self.kv(data).chunk(2, dim=-1)
            x = x + torch.softmax(self.q(self.norm(x)) @ k.transpose(1, 2) / 6**0.5, dim=-1) @ v
            x = x + F.gelu(self.mix(x))
        return self.head(x.mean(dim=1))


class CachedAttention(nn.Module):
    """Keys and values are written to buffers at a position, and read back."""

    def __init__(self, dim: int = 6, length: int = 6):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("cache_k", torch.zeros(BATCH, length, dim))
        self.register_buffer("cache_v", torch.zeros(BATCH, length, dim))

    def forward(self, x, start_pos: int = 0):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split(x.shape[-1], dim=-1)
        self.cache_k[:b, start_pos : start_pos + t] = k.detach()
        self.cache_v[:b, start_pos : start_pos + t] = v.detach()
        keys = torch.cat([self.cache_k[:b, :start_pos].clone(), k], 1)
        values = torch.cat([self.cache_v[:b, :start_pos].clone(), v], 1)
        return self.out(F.scaled_dot_product_attention(q, keys, values))


class SlotAttention(nn.Module):
    """Slots with noise compete for the input; a GRU cell updates them."""

    def __init__(self, dim: int = 6, num_slots: int = 2, iters: int = 2, eps: float = 1e-8):
        super().__init__()
        self.num_slots, self.iters, self.eps, self.scale = num_slots, iters, eps, dim**-0.5
        self.slots_mu, self.slots_logsigma = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gru, self.norm, self.norm_slots = nn.GRUCell(dim, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, inputs):
        b, _, d = inputs.shape
        mu = self.slots_mu.expand(b, self.num_slots, -1)
        sigma = self.slots_logsigma.exp().expand(b, self.num_slots, -1)
        slots = mu + sigma * torch.randn(mu.shape, dtype=inputs.dtype)
        inputs = self.norm(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            q = self.to_q(self.norm_slots(slots))
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps
            attn = attn / attn.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, d), slots_prev.reshape(-1, d)).reshape(b, -1, d)
        return slots


class SlotNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.slots, self.head = nn.Linear(4, 6), SlotAttention(), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.slots(self.first(x)).mean(1))


def translated(x):
    return labels(3, classes=7)


ATTENTION = {
    "multi-query, rotary": Case(lambda: OverTokens(MultiQuery(), width=8), features(3, 4)),
    "grouped queries, complex rotary": Case(lambda: OverTokens(ComplexRotary(), width=8), features(3, 4)),
    "ALiBi": Case(lambda: OverTokens(ALiBi()), features(3, 4)),
    "shifted windows": Case(Swin, features(1, 4, 4)),
    "linear attention": Case(lambda: OverTokens(LinearAttention()), features(4, 4)),
    "local attention": Case(lambda: OverTokens(LocalAttention()), features(5, 4)),
    "cross-attention": Case(
        CrossAttention,
        lambda: {
            "src": labels(4, classes=7), "tgt": labels(3, classes=7),
            "src_key_padding_mask": torch.arange(4) >= torch.tensor([[4], [2], [3], [1]]),
        },
        translated,
    ),
    "latents": Case(Perceiver, features(3, 4)),
    "keys and values in buffers": Case(lambda: OverTokens(CachedAttention()), features(3, 4)),
    "slots": Case(SlotNet, features(4, 4)),
}  # fmt: skip


# Convolutions.


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        outer = planes * self.expansion
        self.conv3, self.bn3 = nn.Conv2d(planes, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        nn.init.constant_(self.bn3.weight, 0.5)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActBlock(nn.Module):
    """The normalised input feeds the shortcut only where that has weights."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class MobileNetV3Block(nn.Module):
    """Widened, filtered channel by channel, squeezed and excited with hard sigmoids, narrowed."""

    def __init__(self, inner: int = 4, expand: int = 6, stride: int = 1):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inner, expand, 1, bias=False), nn.BatchNorm2d(expand), nn.Hardswish(inplace=True),
            nn.Conv2d(expand, expand, 3, stride, 1, groups=expand, bias=False), nn.BatchNorm2d(expand),
        )  # fmt: skip
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(expand, 2, 1), nn.ReLU(), nn.Conv2d(2, expand, 1), nn.Hardsigmoid()
        )
        self.act = nn.Hardswish()
        self.project = nn.Sequential(nn.Conv2d(expand, inner, 1, bias=False), nn.BatchNorm2d(inner))

    def forward(self, x):
        out = self.conv(x)
        return x + self.project(self.act(out * self.se(out)))


class ChannelLayerNorm(nn.Module):
    """Over channels, which come first or last."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6, data_format: str = "channels_first"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))
        self.eps, self.data_format, self.normalized_shape = eps, data_format, (normalized_shape,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GRN(nn.Module):
    """Global response normalisation."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, dim) * 0.3)
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        Gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        Nx = Gx / (Gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * Nx) + self.beta + x


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int = 4, layer_scale_init_value: float = 0.5):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = ChannelLayerNorm(dim, data_format="channels_last")
        self.pwconv1, self.act = nn.Linear(dim, 2 * dim), nn.GELU()
        self.grn, self.pwconv2 = GRN(2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim), requires_grad=True)

    def forward(self, x):
        input = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(x)))))
        x = (self.gamma * x).permute(0, 3, 1, 2)
        return input + x


class Pooled(nn.Module):
    """Blocks of an image between a stem and the mean over positions."""

    def __init__(self, *blocks: nn.Module, inner: int = 2, width: int = 4, outer: int = 4):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(inner, width, 3, padding=1), nn.Sequential(*blocks)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(outer, CLASSES)

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class AttentionUNet(nn.Module):
    """Skips weighted by a gate, bilinear upsampling padded to the skip's size."""

    def __init__(self):
        super().__init__()
        self.inc, self.down = (
            nn.Conv2d(1, 3, 3, padding=1),
            nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1)),
        )
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.W_g, self.W_x = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 2, 1)
        self.psi, self.out = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Sigmoid()), nn.Conv2d(7, CLASSES, 3, padding=1)

    def forward(self, x):
        x1 = torch.tanh(self.inc(x))
        x2 = self.up(torch.tanh(self.down(x1)))
        diffY, diffX = x1.size()[2] - x2.size()[2], x1.size()[3] - x2.size()[3]
        x2 = F.pad(x2, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        gate = self.psi(F.relu(self.W_g(x2) + self.W_x(x1)))
        return self.out(torch.cat([x1 * gate, x2], dim=1))


class DenseBlock(nn.Module):
    """Each layer reads the list of all before it."""

    def __init__(self, num_input: int = 3, growth: int = 2, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleDict()
        for i in range(layers):
            inner = num_input + i * growth
            self.layers[f"denselayer{i + 1}"] = nn.Sequential(
                nn.BatchNorm2d(inner), nn.ReLU(inplace=True), nn.Conv2d(inner, growth, 3, padding=1, bias=False)
            )

    def forward(self, init_features):
        features = [init_features]
        for _, layer in self.layers.items():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Inception(nn.Module):
    def __init__(self, inner: int = 4):
        super().__init__()
        self.branch1 = nn.Conv2d(inner, 2, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(inner, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.branch3 = nn.Sequential(nn.Conv2d(inner, 2, 1), nn.Conv2d(2, 2, (1, 3), padding=(0, 1)),
                                     nn.Conv2d(2, 2, (3, 1), padding=(1, 0)))  # fmt: skip
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), nn.Conv2d(inner, 2, 1)
        )

    def _forward(self, x):
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x):
        return F.relu(torch.cat(self._forward(x), 1))


class Discriminator(nn.Module):
    """DCGAN's two halves: an image from noise, and a verdict."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 2, 1, 0, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
            nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.main = nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(3, 1, 2, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.main(self.generator(z[:, :, None, None])).view(-1, 1).squeeze(1)


def bce(output, target):
    return F.binary_cross_entropy(output, target, reduction="none")


class Chomp1d(nn.Module):
    def __init__(self, chomp_size: int):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """Dilated causal convolutions with weight norm, as old torch had it."""

    def __init__(self, n_inputs: int, n_outputs: int, kernel_size: int = 2, dilation: int = 1, norm: Any = None):
        super().__init__()
        norm = norm or nn.utils.weight_norm
        padding = (kernel_size - 1) * dilation
        self.conv1 = norm(nn.Conv1d(n_inputs, n_outputs, kernel_size, padding=padding, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(n_outputs, n_outputs, kernel_size, padding=padding, dilation=dilation))
        self.net = nn.Sequential(
            self.conv1, Chomp1d(padding), nn.ReLU(), nn.Dropout(0.1),
            self.conv2, Chomp1d(padding), nn.ReLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    def __init__(self, norm: Any = None):
        super().__init__()
        blocks = [TemporalBlock(2 if i == 0 else 4, 4, dilation=2**i, norm=norm) for i in range(2)]
        self.tcn, self.linear = nn.Sequential(*blocks), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.linear(self.tcn(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions; skips are summed up."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.filters = nn.ModuleList([nn.Conv1d(width, width, 2, dilation=2**i) for i in range(2)])
        self.gates = nn.ModuleList([nn.Conv1d(width, width, 2, dilation=2**i) for i in range(2)])
        self.residuals = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(2)])
        self.skips = nn.ModuleList([nn.Conv1d(width, 3, 1) for _ in range(2)])
        self.end = nn.Conv1d(3, CLASSES, 1)

    def forward(self, x):
        x, skip = self.start(x), 0
        for f, g, r, s in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            residual = x
            x = torch.tanh(f(x)) * torch.sigmoid(g(x))
            out = s(x)
            try:
                skip = skip[:, :, -out.size(2) :]
            except TypeError:
                skip = 0
            skip = out + skip
            x = r(x)
            x = x + residual[:, :, -x.size(2) :]
        return self.end(F.relu(skip)).mean(-1)


class SeparableConv2d(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.pointwise = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


class ShuffleUnit(nn.Module):
    """Half of the channels pass by, and all are shuffled."""

    def __init__(self, width: int = 4):
        super().__init__()
        half = width // 2
        self.branch2 = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            SeparableConv2d(half, half),
        )

    @staticmethod
    def channel_shuffle(x, groups):
        batchsize, num_channels, height, width = x.size()
        x = x.view(batchsize, groups, num_channels // groups, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batchsize, num_channels, height, width)

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        return self.channel_shuffle(torch.cat((x1, self.branch2(x2)), dim=1), 2)


class ESPCN(nn.Module):
    def __init__(self, upscale_factor: int = 2):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, upscale_factor**2, 3, 1, 1)
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)

    def forward(self, x):
        bicubic = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return bicubic + self.pixel_shuffle(self.conv2(torch.tanh(self.conv1(x))))


class CoordConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1 + 3, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, input_tensor):
        batch_size, _, x_dim, y_dim = input_tensor.size()
        xx_channel = torch.arange(x_dim).repeat(1, y_dim, 1)
        yy_channel = torch.arange(y_dim).repeat(1, x_dim, 1).transpose(1, 2)
        xx_channel = (xx_channel.to(input_tensor.dtype) / (x_dim - 1)) * 2 - 1
        yy_channel = (yy_channel.to(input_tensor.dtype) / (y_dim - 1)) * 2 - 1
        xx_channel = xx_channel.repeat(batch_size, 1, 1, 1).transpose(2, 3)
        yy_channel = yy_channel.repeat(batch_size, 1, 1, 1).transpose(2, 3)
        ret = torch.cat([input_tensor, xx_channel.type_as(input_tensor), yy_channel.type_as(input_tensor)], dim=1)
        rr = torch.sqrt(torch.pow(xx_channel - 0.5, 2) + torch.pow(yy_channel - 0.5, 2))
        return self.head(F.relu(self.conv(torch.cat([ret, rr], dim=1))).flatten(2).mean(2))


class SpatialTransformer(nn.Module):
    """Warps its input by an affine map that it predicts."""

    def __init__(self):
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True))
        self.fc_loc = nn.Sequential(nn.Linear(12, 6), nn.ReLU(True), nn.Linear(6, 6))
        self.fc_loc[2].weight.data.mul_(0.1)
        self.fc_loc[2].bias.data.copy_(torch.tensor([0.9, 0.1, 0.05, -0.1, 0.9, 0.07], dtype=torch.float))
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, CLASSES)

    def stn(self, x):
        xs = self.localization(x)
        xs = xs.view(-1, 12)
        theta = self.fc_loc(xs).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(self.stn(x))).amax((2, 3)))


class DeformConv(nn.Module):
    """Samples beside the grid, at offsets that it predicts, by gathering four neighbours."""

    def __init__(self):
        super().__init__()
        self.offset, self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 3, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        b, c, h, w = x.shape
        off = 0.5 * torch.tanh(self.offset(x)) + 0.25
        ys, xs = torch.meshgrid(torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype), indexing="ij")
        py, px = (ys + off[:, 0]).clamp(0, h - 1.001), (xs + off[:, 1]).clamp(0, w - 1.001)
        y0, x0 = py.floor(), px.floor()
        flat, out = x.flatten(2), 0
        for dy in (0, 1):
            for dx in (0, 1):
                index = ((y0 + dy).long() * w + (x0 + dx).long()).view(b, 1, -1).expand(-1, c, -1)
                weight = (1 - (py - y0 - dy).abs()) * (1 - (px - x0 - dx).abs())
                out = out + flat.gather(2, index).view(b, c, h, w) * weight.unsqueeze(1)
        return self.fc(torch.tanh(self.conv(out)).mean((2, 3)))


IMAGE = features(2, 4, 4)
CONVOLUTIONS = {
    "bottleneck": Case(lambda: Pooled(Bottleneck(4, 2), Bottleneck(4, 2, 2)), IMAGE),
    "pre-activation": Case(lambda: Pooled(PreActBlock(4, 4), PreActBlock(4, 6, 2), outer=6), IMAGE),
    "inverted residual, hard swish": Case(lambda: Pooled(MobileNetV3Block()), IMAGE),
    "ConvNeXt": Case(lambda: Pooled(ConvNeXtBlock(), ChannelLayerNorm(4), ConvNeXtBlock()), IMAGE),
    "U-Net with gates": Case(AttentionUNet, features(1, 5, 5), lambda x: labels(5, 5)),
    "dense block": Case(lambda: Pooled(DenseBlock(4), outer=10), IMAGE),
    "inception": Case(lambda: Pooled(Inception(), outer=8), IMAGE),
    "transposed convolutions": Case(Discriminator, features(), lambda x: torch.rand(BATCH).double(), bce),
    "temporal convolutions": Case(lambda: TCN(nn.utils.parametrizations.weight_norm), features(2, 6)),
    "temporal convolutions, weight norm by hook": Case(TCN, features(2, 6)),
    "gated dilated convolutions": Case(WaveNet, features(1, 7)),
    "shuffled channels": Case(lambda: Pooled(ShuffleUnit(), nn.ReLU(), ShuffleUnit()), IMAGE),
    "sub-pixel convolution": Case(ESPCN, features(1, 4, 4), numbers(1, 8, 8), "mse"),
    "coordinates as channels": Case(CoordConv, features(1, 4, 4)),
    "spatial transformer": Case(SpatialTransformer, features(1, 6, 6)),
    "deformable convolution": Case(DeformConv, features(1, 4, 4)),
}  # fmt: skip


# Sets and sequences.


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 6), nn.ELU(), nn.Linear(6, 6))
        self.rho = nn.Sequential(nn.Linear(6, 6), nn.ELU(), nn.Linear(6, CLASSES))

    def forward(self, x, lengths):
        mask = torch.arange(x.size(1)).unsqueeze(0) < lengths.unsqueeze(1)
        h = self.phi(x).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.rho(h.sum(1) / lengths.unsqueeze(1).to(x.dtype))


class TNet(nn.Module):
    """Predicts a matrix near the identity."""

    def __init__(self, k: int = 3):
        super().__init__()
        self.k, self.conv, self.fc = k, nn.Conv1d(k, 6, 1), nn.Linear(6, k * k)

    def forward(self, x):
        batchsize = x.size()[0]
        x = torch.max(F.relu(self.conv(x)), 2, keepdim=True)[0].view(-1, 6)
        iden = torch.eye(self.k, dtype=x.dtype).view(1, self.k * self.k).repeat(batchsize, 1)
        return (self.fc(x) + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    """A second result regularises the transform."""

    def __init__(self):
        super().__init__()
        self.stn, self.conv1, self.conv2 = TNet(3), nn.Conv1d(3, 6, 1), nn.Conv1d(6, 8, 1)
        self.bn1, self.bn2, self.fc = nn.BatchNorm1d(6), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        trans = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.max(self.bn2(self.conv2(x)), 2, keepdim=True)[0].view(-1, 8)
        return F.log_softmax(self.fc(x), dim=-1), trans


def pointnet_cost(output, target):
    pred, trans = output
    eye = torch.eye(trans.size(1), dtype=trans.dtype)[None]
    reg = torch.mean(torch.norm(torch.bmm(trans, trans.transpose(2, 1)) - eye, dim=(1, 2)))
    return F.nll_loss(pred, target) + 0.1 * reg


class EdgeConv(nn.Module):
    """Features of the nearest neighbours, found anew for every batch."""

    def __init__(self, k: int = 2):
        super().__init__()
        self.k, self.conv, self.fc = k, nn.Sequential(nn.Conv2d(6, 6, 1), nn.LeakyReLU(0.2)), nn.Linear(6, CLASSES)

    def forward(self, x):
        b, d, n = x.shape
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        xx = torch.sum(x**2, dim=1, keepdim=True)
        idx = (-xx - inner - xx.transpose(2, 1)).topk(k=self.k, dim=-1)[1]
        idx = (idx + torch.arange(0, b).view(-1, 1, 1) * n).view(-1)
        points = x.transpose(2, 1).contiguous()
        feature = points.view(b * n, -1)[idx, :].view(b, n, self.k, d)
        points = points.view(b, n, 1, d).repeat(1, 1, self.k, 1)
        feature = torch.cat((feature - points, points), dim=3).permute(0, 3, 1, 2).contiguous()
        return self.fc(self.conv(feature).max(dim=-1, keepdim=False)[0].mean(-1))


class Seq2Seq(nn.Module):
    """An encoder's state, and a decoder with teacher forcing and attention."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(7, 4), nn.GRU(4, width, batch_first=True)
        self.decoder, self.attn = nn.GRUCell(4 + width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, 7)

    def forward(self, src, tgt):
        memory, hidden = self.encoder(self.embed(src))
        hidden, outputs = hidden.squeeze(0), []
        for step in range(tgt.size(1)):
            scores = torch.bmm(self.attn(memory), hidden.unsqueeze(2)).squeeze(2)
            context = torch.bmm(F.softmax(scores, dim=1).unsqueeze(1), memory).squeeze(1)
            hidden = self.decoder(torch.cat([self.embed(tgt[:, step]), context], dim=1), hidden)
            outputs.append(self.out(hidden))
        return torch.stack(outputs, dim=2)


class BiGRU(nn.Module):
    """Two directions, two layers, the last hidden states side by side, and pooling over time."""

    def __init__(self, rnn: type[nn.RNNBase] = nn.GRU):
        super().__init__()
        self.rnn = rnn(4, 3, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.fc = nn.Linear(18, CLASSES)

    def forward(self, x):
        out, hidden = self.rnn(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        last = torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)
        avg_pool, max_pool = torch.mean(out, 1), torch.max(out, 1)[0]
        return self.fc(torch.cat((last, avg_pool, max_pool), 1))


class PackedLSTM(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.fc = (
            nn.Embedding(7, 4, padding_idx=0),
            nn.LSTM(4, 5, batch_first=True),
            nn.Linear(5, 3),
        )

    def forward(self, tokens, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (h, _) = self.lstm(packed)
        return self.fc(h[-1])


class Behind(nn.Module):
    """A head behind a module."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(CLASSES, CLASSES)

    def forward(self, *args):
        return self.head(torch.tanh(self.encoder(*args)))


class CellLoop(nn.Module):
    """Cells of torch's own in a loop, two layers, both states of each."""

    def __init__(self, hidden: int = 5):
        super().__init__()
        self.hidden = hidden
        self.lstm1, self.lstm2, self.rnn = (
            nn.LSTMCell(4, hidden),
            nn.LSTMCell(hidden, hidden),
            nn.RNNCell(hidden, hidden),
        )
        self.linear = nn.Linear(hidden, CLASSES)

    def forward(self, input):
        h_t = torch.zeros(input.size(0), self.hidden, dtype=torch.double)
        c_t, h_t2, c_t2 = torch.zeros_like(h_t), torch.zeros_like(h_t), torch.zeros_like(h_t)
        r = None
        for input_t in input.split(1, dim=1):
            h_t, c_t = self.lstm1(input_t.squeeze(1), (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            r = self.rnn(h_t2, r)
        return self.linear(r)


class S4D(nn.Module):
    """A diagonal state space with complex poles: its kernel is a sum of powers, applied by FFT."""

    def __init__(self, d: int = 4, n: int = 4):
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(d) * 1.5 - 2)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, n // 2, dtype=torch.cfloat)))
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(d, n // 2)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(n // 2).float().repeat(d, 1))
        self.D, self.out, self.decoder = nn.Parameter(torch.randn(d)), nn.Conv1d(d, 2 * d, 1), nn.Linear(d, CLASSES)

    def kernel(self, L):
        dt, C = torch.exp(self.log_dt), torch.view_as_complex(self.C)
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * dt.unsqueeze(-1)
        K = dtA.unsqueeze(-1) * torch.arange(L)
        C = C * (torch.exp(dtA) - 1.0) / A
        return 2 * torch.einsum("hn,hnl->hl", C, torch.exp(K)).real

    def forward(self, u):
        L = u.size(-1)
        k = self.kernel(L)
        k_f, u_f = torch.fft.rfft(k, n=2 * L), torch.fft.rfft(u, n=2 * L)
        y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
        y = F.gelu(y + u * self.D.unsqueeze(-1))
        return self.decoder(F.glu(self.out(y), dim=-2).mean(-1))


class MambaBlock(nn.Module):
    """A selective scan, step by step, behind a causal convolution and a gate."""

    def __init__(self, d_model: int = 4, d_inner: int = 6, d_state: int = 3, dt_rank: int = 2):
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, dt_rank
        self.in_proj = nn.Linear(d_model, d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, bias=True, kernel_size=2, groups=d_inner, padding=1)
        self.x_proj, self.dt_proj = nn.Linear(d_inner, dt_rank + d_state * 2, bias=False), nn.Linear(dt_rank, d_inner)
        A = torch.arange(1, d_state + 1).float().repeat(d_inner, 1)
        self.A_log, self.D = nn.Parameter(torch.log(A)), nn.Parameter(torch.ones(d_inner))
        self.out_proj, self.head = nn.Linear(d_inner, d_model, bias=False), nn.Linear(d_model, CLASSES)

    def forward(self, x):
        length = x.shape[1]
        x_and_res = self.in_proj(x)
        u, res = x_and_res.split(split_size=[self.d_inner, self.d_inner], dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[:, :, :length].transpose(1, 2))
        y = self.ssm(u) * F.silu(res)
        return self.head((x + self.out_proj(y)).mean(1))

    def ssm(self, x):
        A = -torch.exp(self.A_log)
        delta, B, C = self.x_proj(x).split(split_size=[self.dt_rank, self.d_state, self.d_state], dim=-1)
        return self.selective_scan(x, F.softplus(self.dt_proj(delta)), A, B, C, self.D)

    def selective_scan(self, u, delta, A, B, C, D):
        b, length, d_in = u.shape
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        x = torch.zeros((b, d_in, A.shape[1]), dtype=u.dtype)
        ys = []
        for i in range(length):
            x = deltaA[:, i] * x + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", x, C[:, i, :]))
        return torch.stack(ys, dim=1) + u * D


class BagOfWords(nn.Module):
    """A bag of words with weights of their own."""

    def __init__(self, mode: str = "sum"):
        super().__init__()
        self.embedding, self.fc, self.mode = nn.EmbeddingBag(7, 6, mode=mode), nn.Linear(6, CLASSES), mode
        self.importance = nn.Parameter(torch.rand(7))

    def forward(self, text):
        weights = F.embedding(text, self.importance.unsqueeze(1)).squeeze(-1) if self.mode == "sum" else None
        return self.fc(torch.tanh(self.embedding(text, per_sample_weights=weights)))


class OffsetBag(nn.Module):
    """All words of a batch in a row, and where each text begins."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.EmbeddingBag(7, 6), nn.Linear(6, CLASSES)

    def forward(self, text, offsets):
        return self.fc(self.embedding(text, offsets))


class CharCNN(nn.Module):
    """Convolutions of several widths over characters, the maximum over time of each."""

    def __init__(self):
        super().__init__()
        self.embed, self.convs = nn.Embedding(7, 4), nn.ModuleList([nn.Conv2d(1, 3, (K, 4)) for K in (2, 3)])
        self.dropout, self.fc1 = nn.Dropout(0.3), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.embed(x).unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        return self.fc1(self.dropout(torch.cat(x, 1)))


class CRF(nn.Module):
    """Emissions, and the negative log likelihood of tags by the forward algorithm."""

    def __init__(self, tags: int = 3):
        super().__init__()
        self.embed, self.emit = nn.Embedding(7, 5), nn.Linear(5, tags)
        self.transitions, self.start = nn.Parameter(torch.randn(tags, tags)), nn.Parameter(torch.randn(tags))

    def forward(self, tokens):
        return self.emit(torch.tanh(self.embed(tokens)))


def crf_cost(model):
    def nll(emissions, tags):
        score = model.start[tags[:, 0]] + emissions[:, 0].gather(1, tags[:, :1]).squeeze(1)
        alpha = model.start + emissions[:, 0]
        for i in range(1, tags.size(1)):
            score = score + model.transitions[tags[:, i - 1], tags[:, i]]
            score = score + emissions[:, i].gather(1, tags[:, i : i + 1]).squeeze(1)
            alpha = torch.logsumexp(alpha.unsqueeze(2) + model.transitions + emissions[:, i].unsqueeze(1), dim=1)
        return torch.logsumexp(alpha, dim=1) - score

    return nll


def ctc_cost(output, target):
    lengths = torch.full((output.size(0),), output.size(1), dtype=torch.long)
    sizes = torch.full((target.size(0),), target.size(1), dtype=torch.long)
    return F.ctc_loss(output.log_softmax(-1).transpose(0, 1), target, lengths, sizes, reduction="none")


SEQUENCES = {
    "deep sets": Case(DeepSets, lambda: (torch.randn(BATCH, 5, 3), torch.tensor([5, 3, 2, 4]))),
    "PointNet": Case(PointNet, features(3, 5), cost=pointnet_cost),
    "nearest neighbours": Case(EdgeConv, features(3, 5)),
    "sequence to sequence": Case(Seq2Seq, lambda: (words(4)(), words(3)()), translated),
    "bidirectional GRU": Case(BiGRU, features(3, 4)),
    "bidirectional LSTM": Case(lambda: BiGRU(nn.LSTM), features(3, 4)),
    "packed sequences": Case(
        PackedLSTM, lambda: (words(4)(), torch.tensor([4, 2, 3, 1])), verdict="refused", place=r"self\.lstm\(packed\)"
    ),
    "packed sequences, kept whole": Case(
        lambda: Behind(PackedLSTM()), lambda: (words(4)(), torch.tensor([4, 2, 3, 1])), leaves=(PackedLSTM,)
    ),
    "cells in a loop": Case(CellLoop, features(3, 4)),
    "diagonal state space": Case(S4D, features(4, 5)),
    "selective scan": Case(MambaBlock, features(3, 4)),
    "bag of weighted words": Case(BagOfWords, words()),
    "bag of words, mean": Case(lambda: BagOfWords("mean"), words()),
    "bag of words, offsets": Case(
        OffsetBag, lambda: (torch.randint(7, (9,)), torch.tensor([0, 2, 3, 7])), verdict="refused", place="OffsetBag"
    ),
    "character CNN": Case(CharCNN, words(6)),
    "conditional random field": Case(CRF, words(4), lambda x: labels(4), cost_of=crf_cost),
    "connectionist temporal classification": Case(CRF, words(5), lambda x: 1 + labels(2, classes=2), ctc_cost),
}  # fmt: skip


# Generative models, contrasts, and heads of metric learning.


class Coupling(nn.Module):
    """RealNVP: half of the features scale and shift the other half."""

    def __init__(self, dim: int, hidden: int, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)
        self.s_net = nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))
        self.t_net = nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))
        self.scale = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        x_masked = x * self.mask
        s = torch.tanh(self.s_net(x_masked)) * self.scale
        y = x_masked + (1 - self.mask) * (x * torch.exp(s) + self.t_net(x_masked))
        return y, ((1 - self.mask) * s).sum(dim=1)


class InvertibleLinear(nn.Module):
    """Glow's matrix by its LU factors: the permutation is a buffer."""

    def __init__(self, dim: int = 4):
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(dim, dim))
        p, lower, upper = torch.linalg.lu(q)
        s = torch.diag(upper)
        self.register_buffer("p", p)
        self.register_buffer("sign_s", torch.sign(s))
        self.register_buffer("l_mask", torch.tril(torch.ones(dim, dim), -1))
        self.register_buffer("eye", torch.eye(dim))
        self.lower, self.log_s, self.upper = (
            nn.Parameter(lower), nn.Parameter(torch.log(torch.abs(s))), nn.Parameter(torch.triu(upper, 1))
        )  # fmt: skip

    def forward(self, x):
        lower = self.lower * self.l_mask + self.eye
        u = self.upper * self.l_mask.transpose(0, 1).contiguous()
        u += torch.diag(self.sign_s * torch.exp(self.log_s))
        return x @ (self.p @ lower @ u).t(), self.log_s.sum().expand(x.size(0))


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        mask = torch.arange(4).float() % 2
        self.flows = nn.ModuleList([Coupling(4, 6, mask), InvertibleLinear(), Coupling(4, 6, 1 - mask)])
        self.base_mu = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        log_det = torch.zeros(x.shape[0], dtype=x.dtype)
        for flow in self.flows:
            x, ld = flow(x)
            log_det = log_det + ld
        prior = -0.5 * ((x - self.base_mu) ** 2 + math.log(2 * math.pi)).sum(dim=1)
        return {"z": x, "nll": -(prior + log_det)}


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.fc3, self.fc4 = nn.Linear(2, 6), nn.Linear(6, 4)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 4))
        z = self.reparameterize(mu, logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def elbo(output, x):
    recon_x, mu, logvar = output
    BCE = F.binary_cross_entropy(recon_x, x.view(-1, 4), reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (BCE + KLD) / len(x)


class DistributionVAE(nn.Module):
    """With `torch.distributions`."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)
        self.prior_mu = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        mu, raw = torch.tanh(self.encoder(x)).chunk(2, -1)
        q = torch.distributions.Normal(mu, F.softplus(raw), validate_args=False)
        z = q.rsample()
        p = torch.distributions.Normal(self.prior_mu, torch.ones_like(mu), validate_args=False)
        kl = torch.distributions.kl_divergence(q, p).sum(-1)
        return self.decoder(torch.sin(z)), kl


class Diffusion(nn.Module):
    """Noises its input at random steps, and predicts the noise."""

    def __init__(self, T: int = 10):
        super().__init__()
        self.T, self.time, self.net = T, nn.Embedding(T, 6), nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 4))
        self.inp = nn.Linear(4, 6)
        betas = torch.linspace(1e-4, 0.3, T).double()
        alphas_bar = torch.cumprod(1.0 - betas, dim=0)
        self.register_buffer("sqrt_alphas_bar", torch.sqrt(alphas_bar))
        self.register_buffer("sqrt_one_minus_alphas_bar", torch.sqrt(1.0 - alphas_bar))

    def forward(self, x_0):
        t = torch.randint(self.T, size=(x_0.shape[0],), device=x_0.device)
        noise = torch.randn_like(x_0)
        x_t = (
            self.sqrt_alphas_bar[t].view(-1, 1) * x_0 + self.sqrt_one_minus_alphas_bar.gather(0, t).view(-1, 1) * noise
        )
        return F.mse_loss(self.net(torch.tanh(self.inp(x_t)) + self.time(t)), noise, reduction="none")


class CLIP(nn.Module):
    """Two towers with a learnt temperature: every example is compared with all."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)), nn.Embedding(7, 6)
        self.text_projection = nn.Parameter(torch.randn(6, 5) * 6**-0.5)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.5))

    def forward(self, image, text):
        image_features = self.visual(image)
        text_features = torch.tanh(self.text(text)).mean(dim=1) @ self.text_projection
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def clip_cost(output, target):
    a, b = output
    return (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 2))

    def forward(self, anchor, positive, negative):
        return self.embedding_net(anchor), self.embedding_net(positive), self.embedding_net(negative)


def triplet(output, _):
    return F.triplet_margin_loss(*output, margin=2.0, reduction="none")


class SimSiam(nn.Module):
    """One side of each pair passes no gradient."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
        self.predictor = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5))

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()


def simsiam_cost(output, _):
    p1, p2, z1, z2 = output
    return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)) * 0.5


class BYOL(nn.Module):
    """The target network follows the online one, by a moving average of its parameters in forward."""

    def __init__(self):
        super().__init__()
        self.online, self.target = nn.Linear(4, 5), nn.Linear(4, 5)
        self.target.requires_grad_(False)
        self.predictor = nn.Linear(5, 5)

    @torch.no_grad()
    def _momentum_update(self, m=0.9):
        for q, k in zip(self.online.parameters(), self.target.parameters(), strict=True):
            k.data = k.data * m + q.data * (1.0 - m)

    def forward(self, x1, x2):
        with torch.no_grad():
            self._momentum_update()
            k = F.normalize(self.target(x2), dim=1)
        return self.predictor(torch.tanh(self.online(x1))), k


class Projected(nn.Module):
    """A layer behind the first result of a module that has two."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, nn.Linear(5, 5)

    def forward(self, x1, x2):
        q, k = self.encoder(x1, x2)
        return self.projector(q), k


class MoCo(nn.Module):
    """Keys in a queue, written at a pointer that is a buffer."""

    def __init__(self, K: int = 8):
        super().__init__()
        self.K, self.encoder, self.key = K, nn.Linear(4, 5), nn.Linear(4, 5).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(5, K), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k):
        q = F.normalize(self.encoder(im_q), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(im_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / 0.5
        with torch.no_grad():
            places = (self.ptr + torch.arange(k.shape[0])) % self.K
            self.queue[:, places] = k.T
            self.ptr[0] = (self.ptr[0] + k.shape[0]) % self.K
        return logits


class ArcMarginProduct(nn.Module):
    def __init__(self, inner: int = 6, outer: int = CLASSES, s: float = 4.0, m: float = 0.3):
        super().__init__()
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.empty(outer, inner))
        nn.init.xavier_uniform_(self.weight)
        self.cos_m, self.sin_m = math.cos(m), math.sin(m)
        self.th, self.mm = math.cos(math.pi - m), math.sin(math.pi - m) * m

    def forward(self, input, label):
        cosine = F.linear(F.normalize(input), F.normalize(self.weight))
        sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(0, 1))
        phi = cosine * self.cos_m - sine * self.sin_m
        phi = torch.where(cosine > self.th, phi, cosine - self.mm)
        one_hot = torch.zeros(cosine.size(), dtype=cosine.dtype)
        one_hot.scatter_(1, label.view(-1, 1).long(), 1)
        return ((one_hot * phi) + ((1.0 - one_hot) * cosine)) * self.s


class FaceNet(nn.Module):
    """Its head takes the labels, as an input, and only while it trains."""

    def __init__(self):
        super().__init__()
        self.body, self.margin = nn.Sequential(nn.Linear(4, 6), nn.PReLU()), ArcMarginProduct()

    def forward(self, x, label=None):
        emb = self.body(x)
        return self.margin(emb, label) if self.training and label is not None else emb


class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(CLASSES, 6))
        self.sigma = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        out = F.linear(F.normalize(torch.relu(self.body(x)), p=2, dim=1), F.normalize(self.weight, p=2, dim=1))
        return self.sigma * out


class Prototypical(nn.Module):
    """Classes are the means of a support set, which comes with each batch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, query, support):
        proto = self.encoder(support).mean(1)
        return -torch.cdist(self.encoder(query), proto).pow(2)


class CenterLoss(nn.Module):
    """A cost with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(CLASSES, CLASSES).double())

    def forward(self, output, target):
        pull = (output - self.centers[target]).pow(2).sum(1)
        return F.cross_entropy(output, target, reduction="none") + 0.1 * pull


class DeepSupervision(nn.Module):
    """Heads at every depth, in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        self.heads = nn.ModuleList([nn.Linear(6, CLASSES) for _ in range(3)])

    def forward(self, x):
        outputs = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = F.relu(layer(x))
            outputs.append(head(x))
        return tuple(outputs) if self.training else outputs[-1]


def deeply(outputs, target):
    weights = (0.2, 0.3, 1.0)
    return sum(w * F.cross_entropy(o, target, reduction="none") for w, o in zip(weights, outputs, strict=True))


class GoogLike(nn.Module):
    """The result and an auxiliary head, as a named tuple, and the last of both as the logits of a dictionary."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux, self.fc = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, CLASSES),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return {"logits": self.fc(torch.tanh(self.b(h))), "aux": self.aux(h)}


class EarlyExit(nn.Module):
    """Each exit weighs by what the earlier ones left, as a halting probability."""

    def __init__(self):
        super().__init__()
        self.first, self.step, self.halt, self.head = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 1),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x):
        h, left, out = torch.tanh(self.first(x)), 1.0, 0.0
        for i in range(3):
            h = torch.tanh(self.step(h))
            p = torch.sigmoid(self.halt(h)) if i < 2 else 1.0
            out = out + left * p * self.head(h)
            left = left * (1 - p)
        return out


class ConfidentExit(nn.Module):
    """Leaves at the first exit that is sure."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.exit, self.head = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, CLASSES),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x):
        h = torch.tanh(self.a(x))
        early = self.exit(h)
        if early.softmax(-1).max(-1).values.min() > 0.99:
            return early
        return self.head(torch.tanh(self.b(h)))


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4), torch.randn(BATCH, 4)


CONTRASTS = {
    "normalising flow": Case(Flow, features(), lambda x: x, lambda o, _: o["nll"]),
    "variational autoencoder": Case(VAE, lambda: torch.rand(BATCH, 4), lambda x: x, elbo),
    "variational, distributions": Case(
        DistributionVAE, features(), lambda x: x, lambda o, x: (o[0] - x).square().sum(-1) + o[1]
    ),
    "diffusion": Case(Diffusion, features(), lambda x: x, lambda o, _: o.mean(1)),
    "two towers": Case(CLIP, lambda: (torch.randn(BATCH, 4), words(3)()), lambda x: torch.arange(BATCH), clip_cost),
    "triplets": Case(Siamese, lambda: tuple(torch.randn(3, BATCH, 4)), lambda x: x[0], triplet),
    "stopped gradients": Case(SimSiam, pairs, lambda x: x[0], simsiam_cost),
    "momentum encoder in forward": Case(
        BYOL, pairs, lambda x: x[0], lambda o, _: -F.cosine_similarity(*o), verdict="refused", place="BYOL"
    ),
    "momentum encoder in forward, kept whole": Case(
        lambda: Projected(BYOL()), pairs, lambda x: x[0], lambda o, _: -F.cosine_similarity(*o), leaves=(BYOL,),
        verdict="refused", place="BYOL|encoder",
    ),
    "queue of keys": Case(MoCo, pairs, lambda x: torch.zeros(BATCH, dtype=torch.long)),
    "ArcFace": Case(FaceNet, lambda: (torch.randn(BATCH, 4), torch.arange(BATCH) % 3), lambda x: x[1]),
    "cosine classifier": Case(CosineClassifier, features()),
    "prototypes": Case(
        Prototypical, lambda: {"query": torch.randn(BATCH, 4), "support": torch.randn(3, 2, 4)}
    ),
    "cost with centres": Case(lambda: mlp(nn.Tanh()), features(), cost_of=lambda _: CenterLoss()),
    "deep supervision": Case(DeepSupervision, features(), cost=deeply),
    "dictionary of logits": Case(GoogLike, features()),
    "dictionary with its own cost": Case(
        GoogLike, features(), cost=lambda o, y: F.cross_entropy(o["logits"], y) + 0.3 * F.cross_entropy(o["aux"], y)
    ),
    "halting probabilities": Case(EarlyExit, features()),
    "exit where sure": Case(ConfidentExit, features(), verdict="refused", place=r"if early\.softmax"),
}  # fmt: skip


# Depth by iteration, and unusual layers.


class NeuralODE(nn.Module):
    """Fixed steps of Runge and Kutta, with the time as a feature."""

    def __init__(self, steps: int = 2):
        super().__init__()
        self.steps, self.inp, self.out = steps, nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))

    def odefunc(self, t, y):
        return self.f(torch.cat([y, torch.full_like(y[:, :1], t)], dim=1))

    def forward(self, x):
        y, h = self.inp(x), 1.0 / self.steps
        for i in range(self.steps):
            t = i * h
            k1 = self.odefunc(t, y)
            k2 = self.odefunc(t + h / 2, y + h / 2 * k1)
            k3 = self.odefunc(t + h / 2, y + h / 2 * k2)
            k4 = self.odefunc(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.out(y)


class EulerODE(NeuralODE):
    def forward(self, x):
        y = self.inp(x)
        for i, dt in enumerate(torch.linspace(0, 1, 4).diff().tolist()):
            y = y + dt * self.odefunc(i * dt, y)
        return self.out(y)


class DEQ(nn.Module):
    """The fixed point without a gradient, then one step with one, as in one-step gradients."""

    def __init__(self, dim: int = 6, iterations: int = 8):
        super().__init__()
        self.inject, self.f, self.head, self.iterations = (
            nn.Linear(4, dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, 3),
            iterations,
        )
        with torch.no_grad():
            self.f.weight.mul_(0.5)

    def cell(self, z, x):
        return torch.tanh(self.f(z) + x)

    def forward(self, x):
        x = self.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(self.iterations):
                z = self.cell(z, x)
        z = self.cell(z, x)
        return self.head(z)


class UnrolledDEQ(DEQ):
    def forward(self, x):
        x = self.inject(x)
        z = torch.zeros_like(x)
        for _ in range(3):
            z = self.cell(z, x)
        return self.head(z)


class HookedDEQ(DEQ):
    """The gradient at the fixed point is solved for in a hook."""

    def forward(self, x):
        x = self.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(self.iterations):
                z = self.cell(z, x)
        z = self.cell(z, x)
        if self.training:
            z0 = z.clone().detach().requires_grad_()
            f0 = self.cell(z0, x)

            def backward_hook(grad):
                g = grad
                for _ in range(10):
                    g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
                return g

            z.register_hook(backward_hook)
        return self.head(z)


class KANLinear(nn.Module):
    """Splines on a grid that is a buffer, and a base function beside."""

    def __init__(self, in_features: int, out_features: int, grid_size: int = 3, spline_order: int = 2):
        super().__init__()
        self.in_features, self.out_features, self.spline_order = in_features, out_features, spline_order
        h = 2 / grid_size
        grid = (torch.arange(-spline_order, grid_size + spline_order + 1) * h - 1).expand(in_features, -1).contiguous()
        self.register_buffer("grid", grid)
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) * 0.4)
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, grid_size + spline_order) * 0.4)
        self.base_activation = nn.SiLU()

    def b_splines(self, x):
        assert x.dim() == 2 and x.size(1) == self.in_features
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            bases = ((x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]) + (
                (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)]) * bases[:, :, 1:]
            )
        return bases.contiguous()

    def forward(self, x):
        base_output = F.linear(self.base_activation(x), self.base_weight)
        spline_output = F.linear(self.b_splines(x).view(x.size(0), -1), self.spline_weight.view(self.out_features, -1))
        return base_output + spline_output


class MixerBlock(nn.Module):
    def __init__(self, tokens: int = 4, dim: int = 6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token = nn.Sequential(nn.Conv1d(tokens, 5, kernel_size=1), nn.GELU(), nn.Conv1d(5, tokens, kernel_size=1))
        self.channel = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x):
        x = x + self.token(self.norm1(x))
        return x + self.channel(self.norm2(x))


class SpatialGatingUnit(nn.Module):
    def __init__(self, d_ffn: int = 4, seq_len: int = 4):
        super().__init__()
        self.norm, self.spatial_proj = nn.LayerNorm(d_ffn), nn.Conv1d(seq_len, seq_len, kernel_size=1)
        nn.init.constant_(self.spatial_proj.bias, 1.0)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        return u * self.spatial_proj(self.norm(v))


class gMLPBlock(nn.Module):
    def __init__(self, d_model: int = 6, d_ffn: int = 4):
        super().__init__()
        self.norm, self.proj1 = nn.LayerNorm(d_model), nn.Linear(d_model, d_ffn * 2)
        self.proj2, self.sgu = nn.Linear(d_ffn, d_model), SpatialGatingUnit(d_ffn)

    def forward(self, x):
        residual = x
        x = self.proj2(self.sgu(F.gelu(self.proj1(self.norm(x)))))
        return x + residual


class Capsules(nn.Module):
    """Routing by agreement: coefficients from detached votes, the last round with a gradient."""

    def __init__(self, in_caps: int = 3, in_dim: int = 4, out_caps: int = CLASSES, out_dim: int = 3, iters: int = 3):
        super().__init__()
        self.in_caps, self.out_caps, self.iters = in_caps, out_caps, iters
        self.primary = nn.Linear(4, in_caps * in_dim)
        self.W = nn.Parameter(torch.randn(1, in_caps, out_caps, out_dim, in_dim) * 0.5)

    @staticmethod
    def squash(x, dim=-1):
        squared_norm = (x**2).sum(dim=dim, keepdim=True)
        return squared_norm / (1 + squared_norm) * x / (squared_norm.sqrt() + 1e-8)

    def forward(self, x):
        u = self.squash(self.primary(x).view(x.size(0), self.in_caps, -1))
        u_hat = torch.matmul(self.W, u[:, :, None, :, None]).squeeze(-1)
        temp_u_hat = u_hat.detach()
        b = torch.zeros(x.size(0), self.in_caps, self.out_caps, 1, dtype=x.dtype)
        for _ in range(self.iters - 1):
            c = b.softmax(dim=2)
            v = self.squash((c * temp_u_hat).sum(dim=1))
            b = b + (temp_u_hat * v.unsqueeze(1)).sum(-1, keepdim=True)
        v = self.squash((b.softmax(dim=2) * u_hat).sum(dim=1))
        return v.norm(dim=-1)


def margin_loss(v, y):
    T = F.one_hot(y, CLASSES).to(v.dtype)
    return (T * F.relu(0.9 - v) ** 2 + 0.5 * (1 - T) * F.relu(v - 0.1) ** 2).sum(dim=1)


class RBF(nn.Module):
    def __init__(self, in_features: int = 4, out_features: int = 6):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(out_features, in_features))
        self.log_sigmas = nn.Parameter(torch.zeros(out_features))

    def forward(self, input):
        size = (input.size(0), self.centres.size(0), self.centres.size(1))
        x = input.unsqueeze(1).expand(size)
        c = self.centres.unsqueeze(0).expand(size)
        distances = (x - c).pow(2).sum(-1).pow(0.5) / torch.exp(self.log_sigmas).unsqueeze(0)
        return torch.exp(-1 * distances.pow(2))


class FourierFeatures(nn.Module):
    def __init__(self, inner: int = 4, half: int = 3, scale: float = 0.5):
        super().__init__()
        self.register_buffer("B", torch.randn((inner, half)) * scale)

    def forward(self, x):
        x = 2 * math.pi * x @ self.B
        return torch.cat([torch.sin(x), torch.cos(x)], dim=1)


class SineLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, is_first: bool = False, omega_0: float = 5.0):
        super().__init__()
        self.omega_0, self.linear = omega_0, nn.Linear(in_features, out_features)
        with torch.no_grad():
            bound = 1 / in_features if is_first else math.sqrt(6 / in_features) / omega_0
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, input):
        return torch.sin(self.omega_0 * self.linear(input))


class Maxout(nn.Module):
    def __init__(self, d_in: int = 6, d_out: int = 6, pool_size: int = 2):
        super().__init__()
        self.d_out, self.pool_size, self.lin = d_out, pool_size, nn.Linear(d_in, d_out * pool_size)

    def forward(self, inputs):
        shape = list(inputs.size())
        shape[-1] = self.d_out
        shape.append(self.pool_size)
        m, _ = self.lin(inputs).view(*shape).max(len(shape) - 1)
        return m


class PAU(nn.Module):
    """A rational activation, its coefficients trained; and a swish with a trained slope."""

    def __init__(self):
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor([0.02, 0.6, 0.5, 0.1]))
        self.denominator = nn.Parameter(torch.tensor([0.4, 0.3]))
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x):
        powers = torch.stack([x**i for i in range(4)], dim=-1)
        p = (powers * self.numerator).sum(-1)
        q = 1 + (powers[..., 1:3] * self.denominator).sum(-1).abs()
        return p / q + 0.1 * x * torch.sigmoid(self.beta * x)


class Snake(nn.Module):
    def __init__(self, features: int = 6):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x + (1.0 / (self.alpha + 1e-9)) * torch.pow(torch.sin(x * self.alpha), 2)


class TensorTrain(nn.Module):
    """A weight in factors, and products of features of second order (a factorisation machine)."""

    def __init__(self):
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.randn(2, 3, 2) * 0.6), nn.Parameter(torch.randn(2, 2, 3) * 0.6)
        self.v, self.head = nn.Parameter(torch.randn(9, 3) * 0.3), nn.Linear(9, CLASSES)

    def forward(self, x):
        h = torch.einsum("bij,iar->bjar", x.view(-1, 2, 2), self.g1)
        h = torch.einsum("bjar,rjc->bac", h, self.g2).flatten(1)
        square_of_sum = torch.mm(h, self.v).pow(2).sum(1, keepdim=True)
        sum_of_square = torch.mm(h.pow(2), self.v.pow(2)).sum(1, keepdim=True)
        return self.head(h) + 0.5 * (square_of_sum - sum_of_square)


class FNetBlock(nn.Module):
    def __init__(self, dim: int = 6):
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x):
        x = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return self.ff(self.norm(x))


class SpectralConv1d(nn.Module):
    """Complex weights on the lowest frequencies."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3, modes: int = 2):
        super().__init__()
        self.out_channels, self.modes1 = out_channels, modes
        self.weights1 = nn.Parameter(0.4 * torch.rand(in_channels, out_channels, modes, dtype=torch.cdouble))

    def forward(self, x):
        batchsize = x.shape[0]
        x_ft = torch.fft.rfft(x)
        out_ft = torch.zeros(batchsize, self.out_channels, x.size(-1) // 2 + 1, dtype=torch.cdouble)
        out_ft[:, :, : self.modes1] = torch.einsum("bix,iox->box", x_ft[:, :, : self.modes1], self.weights1)
        return torch.fft.irfft(out_ft, n=x.size(-1))


class FNO(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc0, self.conv0, self.w0, self.fc1 = nn.Linear(1, 3), SpectralConv1d(), nn.Conv1d(3, 3, 1), nn.Linear(3, 1)

    def forward(self, x):
        x = self.fc0(x).permute(0, 2, 1)
        x = F.gelu(self.conv0(x) + self.w0(x))
        return self.fc1(x.permute(0, 2, 1))


class ComplexLinear(nn.Module):
    """Complex numbers as pairs of real layers, and `torch.complex` for the product."""

    def __init__(self):
        super().__init__()
        self.re, self.im, self.fc = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        z = torch.complex(self.re(x), self.im(x))
        z = z * torch.exp(1j * torch.angle(z)) + z.conj()
        return self.fc(torch.log1p(z.abs()))


class Sparsemax(nn.Module):
    """The projection on the simplex, by sorting."""

    def forward(self, z):
        z = z - z.max(dim=-1, keepdim=True)[0]
        zs = torch.sort(z, dim=-1, descending=True)[0]
        rhos = torch.arange(1, z.size(-1) + 1, dtype=z.dtype).view(1, -1).expand_as(zs)
        bound = 1 + rhos * zs
        cumsum = torch.cumsum(zs, dim=-1)
        is_gt = torch.gt(bound, cumsum).type(z.type())
        k = torch.max(is_gt * rhos, dim=-1, keepdim=True)[0]
        taus = (torch.sum(is_gt * zs, dim=-1, keepdim=True) - 1) / k
        return torch.max(torch.zeros_like(z), z - taus)


class KWinners(nn.Module):
    """All but the largest are set to zero."""

    def __init__(self, k: int = 3):
        super().__init__()
        self.k = k

    def forward(self, x):
        values, indices = torch.topk(x, self.k, dim=1)
        return torch.zeros_like(x).scatter_(1, indices, values)


class Cumulative(nn.Module):
    """Ordered thresholds, a cumulative softmax (ON-LSTM's) and a running log of sums."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.raw = nn.Linear(4, 6), nn.Linear(6, 1), nn.Parameter(torch.rand(CLASSES))

    def forward(self, x):
        h = self.a(x)
        h = torch.cumsum(torch.softmax(h, -1), dim=-1) * torch.logcumsumexp(h, dim=-1)
        h = h + torch.cumprod(torch.sigmoid(h), dim=-1)
        return self.b(h) - torch.cumsum(F.softplus(self.raw), 0)


class SoftDecisionTree(nn.Module):
    """Every leaf with the probability of its path."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.depth, self.inner = depth, nn.Sequential(nn.Linear(5, 2**depth - 1, bias=False), nn.Sigmoid())
        self.leaf_nodes = nn.Linear(2**depth, CLASSES, bias=False)

    def forward(self, X):
        batch_size = X.size()[0]
        X = torch.cat((torch.ones(batch_size, 1, dtype=X.dtype), X), 1)
        path_prob = self.inner(X)
        path_prob = torch.stack((path_prob, 1 - path_prob), dim=2)
        _mu = X.new_ones(batch_size, 1, 1)
        begin, end = 0, 1
        for layer_idx in range(self.depth):
            _path_prob = path_prob[:, begin:end, :]
            _mu = _mu.view(batch_size, -1, 1).repeat(1, 1, 2) * _path_prob
            begin, end = end, end + 2 ** (layer_idx + 1)
        return self.leaf_nodes(_mu.view(batch_size, 2**self.depth))


class NALU(nn.Module):
    def __init__(self, inner: int = 6, outer: int = 6):
        super().__init__()
        self.W_hat, self.M_hat, self.G = (nn.Parameter(torch.randn(outer, inner)) for _ in range(3))

    def forward(self, x):
        W = torch.tanh(self.W_hat) * torch.sigmoid(self.M_hat)
        a, g = F.linear(x, W), torch.sigmoid(F.linear(x, self.G))
        m = torch.exp(F.linear(torch.log(torch.abs(x) + 1e-2), 0.3 * W))
        return g * a + (1 - g) * m


class Memory(nn.Module):
    """Hopfield retrieval from a memory that is trained, and one that is a buffer."""

    def __init__(self):
        super().__init__()
        self.query, self.keys, self.out = nn.Linear(4, 5), nn.Parameter(torch.randn(6, 5)), nn.Linear(10, CLASSES)
        self.register_buffer("stored", torch.randn(3, 5))

    def forward(self, x):
        q = self.query(x)
        for _ in range(2):
            q = torch.softmax(2.0 * q @ self.keys.t(), dim=-1) @ self.keys
        other = torch.softmax(-torch.cdist(q, self.stored), dim=-1) @ self.stored
        return self.out(torch.cat([q, other], -1))


ITERATED = {
    "Runge and Kutta": Case(NeuralODE, features()),
    "Euler": Case(EulerODE, features()),
    "fixed point, one step": Case(DEQ, features()),
    "fixed point, unrolled": Case(UnrolledDEQ, features()),
    "fixed point, solved in a hook": Case(HookedDEQ, features(), verdict="refused", place="HookedDEQ"),
    "splines": Case(lambda: nn.Sequential(KANLinear(4, 5), KANLinear(5, 3)), lambda: torch.rand(BATCH, 4) - 0.5),
    "MLP mixer": Case(lambda: OverTokens(MixerBlock()), features(4, 4)),
    "gMLP": Case(lambda: OverTokens(gMLPBlock()), features(4, 4)),
    "capsules": Case(Capsules, features(), cost=margin_loss),
    "radial basis functions": Case(
        lambda: nn.Sequential(RBF(), nn.Linear(6, 4), RBF(4, 6), nn.Linear(6, 3)), features()
    ),
    "random Fourier features": Case(lambda: nn.Sequential(FourierFeatures(), mlp(nn.ReLU(), inner=6)), features()),
    "sines": Case(
        lambda: nn.Sequential(SineLayer(2, 6, True), SineLayer(6, 6), nn.Linear(6, 1)), features(2), numbers(1), "mse"
    ),
    "maxout": Case(lambda: mlp(Maxout(), Maxout()), features()),
    "PReLU": Case(lambda: mlp(nn.PReLU(), nn.Linear(6, 6), nn.PReLU(6)), features()),
    "rational activation": Case(lambda: mlp(PAU(), nn.Linear(6, 6), Snake()), features()),
    "tensors in factors": Case(TensorTrain, features()),
    "Fourier mixing": Case(lambda: OverTokens(FNetBlock()), features(3, 4)),
    "Fourier neural operator": Case(FNO, features(6, 1), numbers(6, 1), "mse"),
    "complex numbers": Case(ComplexLinear, features()),
    "sparsemax": Case(lambda: mlp(Sparsemax(), nn.Linear(6, 6), nn.Tanh()), features()),
    "k winners": Case(lambda: mlp(KWinners(), nn.Linear(6, 6), nn.Tanh()), features()),
    "cumulative sums": Case(Cumulative, features()),
    "soft decision tree": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), SoftDecisionTree()), features()),
    "arithmetic units": Case(lambda: mlp(NALU()), features()),
    "associative memory": Case(Memory, features()),
}  # fmt: skip


# Ways of holding parameters, and of being called.


class DictModel(nn.Module):
    """A dictionary of numbers and categories, one embedding each."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"colour": nn.Embedding(3, 2), "size": nn.Embedding(4, 2)})
        self.numeric, self.head = nn.BatchNorm1d(4), nn.Linear(8, CLASSES)

    def forward(self, batch: dict):
        parts = [emb(batch[name]) for name, emb in self.embeddings.items()]
        return {"logits": self.head(torch.relu(torch.cat([*parts, self.numeric(batch["numbers"])], dim=-1)))}


class OptionalArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.side = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Linear(2, 6)

    def forward(self, x, mask=None, *, side=None, return_hidden: bool = False, scale: float = 1.0):
        h = torch.tanh(self.fc1(x))
        if side is not None:
            h = h + self.side(side)
        if mask is not None:
            h = h.masked_fill(mask == 0, 0.0)
        out = self.fc2(h) * scale
        return (out, h) if return_hidden else out


class Routed(nn.Module):
    """Modules chosen by a key of Python's, and a list of names."""

    def __init__(self, route=("wide", "narrow", "wide")):
        super().__init__()
        self.blocks = nn.ModuleDict(
            {"wide": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), "narrow": nn.Linear(6, 6)}
        )
        self.activations = nn.ModuleDict([["lrelu", nn.LeakyReLU()], ["prelu", nn.PReLU()]])
        self.first, self.head, self.route = nn.Linear(4, 6), nn.Linear(6, CLASSES), route

    def forward(self, x, act: str = "prelu"):
        x = self.first(x)
        for key in self.route:
            x = x + self.activations[act](self.blocks[key](x))
        return self.head(x)


class ParameterLists(nn.Module):
    def __init__(self, widths=(4, 6, 5, CLASSES)):
        super().__init__()
        sizes = list(pairwise(widths))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in sizes])
        self.biases = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(b)) for i, (_, b) in enumerate(sizes)})

    def forward(self, x):
        for i, w in enumerate(self.weights):
            x = torch.addmm(self.biases[str(i)], x, w)
            if i < len(self.weights) - 1:
                x = F.leaky_relu(x, negative_slope=0.2)
        return x


class MaskedLinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.ones(out_features, in_features))

    def set_mask(self, mask):
        self.mask.data.copy_(mask.t())

    def forward(self, input):
        return F.linear(input, self.mask * self.weight, self.bias)


class MADE(nn.Module):
    """Autoregressive by masks, which are drawn once."""

    def __init__(self, nin: int = 4, hidden: int = 6):
        super().__init__()
        self.net = nn.Sequential(MaskedLinear(nin, hidden), nn.ReLU(), MaskedLinear(hidden, nin))
        m0, m1 = torch.arange(nin), torch.randint(nin - 1, (hidden,))
        self.net[0].set_mask((m0[:, None] <= m1[None, :]).float())
        self.net[2].set_mask((m1[:, None] < m0[None, :]).float())

    def forward(self, x):
        return self.net(x)


def pruned() -> nn.Module:
    model = mlp(nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    prune.l1_unstructured(model[0], name="weight", amount=0.3)
    prune.ln_structured(model[2], name="weight", amount=0.5, n=2, dim=0)
    prune.random_unstructured(model[2], name="bias", amount=1)
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return mlp(nn.Tanh(), norm(nn.Linear(6, 6)), nn.Tanh(), norm(nn.Linear(6, 6)), nn.ReLU())


class LotteryTicket(nn.Module):
    """Scores choose the weights of a frozen layer, straight through."""

    def __init__(self, inner: int = 6, outer: int = 6, sparsity: float = 0.5):
        super().__init__()
        self.linear, self.sparsity = nn.Linear(inner, outer, bias=False).requires_grad_(False), sparsity
        self.scores = nn.Parameter(torch.randn(outer, inner))

    def forward(self, x):
        j = int((1 - self.sparsity) * self.scores.numel())
        _, idx = self.scores.abs().flatten().sort()
        flat = torch.zeros_like(self.scores).flatten()
        flat[idx[j:]] = 1
        mask = flat.view_as(self.scores)
        mask = self.scores.abs() + (mask - self.scores.abs()).detach()
        return F.linear(x, self.linear.weight * mask)


class L0Linear(nn.Module):
    """Hard concrete gates, one draw a batch; the number of open ones is a cost."""

    def __init__(self, inner: int = 6, outer: int = 6):
        super().__init__()
        self.weights, self.log_alpha = nn.Parameter(torch.randn(inner, outer) * 0.4), nn.Parameter(torch.randn(inner))

    def regularisation(self):
        return torch.sigmoid(self.log_alpha - 2 / 3 * math.log(0.1 / 1.1)).sum()

    def forward(self, x):
        u = torch.empty(self.log_alpha.shape, dtype=x.dtype).uniform_(0.01, 0.99)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + self.log_alpha) * 1.5)
        z = F.hardtanh(s * 1.2 - 0.1, min_val=0, max_val=1)
        return x.mm(z.view(-1, 1) * self.weights)


def with_l0(model):
    return lambda output, target: F.cross_entropy(output, target) + 0.1 * model[2].regularisation()


class BayesLinear(nn.Module):
    """Weights drawn anew for every batch, by reparametrisation; the divergence is left on the module."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.mu, self.rho = (
            nn.Parameter(torch.randn(outer, inner) * 0.4),
            nn.Parameter(torch.full((outer, inner), -2.0)),
        )
        self.aux_loss = None

    def forward(self, x):
        sigma = torch.log1p(torch.exp(self.rho))
        weight = self.mu + sigma * torch.randn_like(sigma)
        self.aux_loss = (-torch.log(sigma) + (sigma**2 + self.mu**2) / 2 - 0.5).sum()
        return F.linear(x, weight)


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing."""

    def __init__(self, use_reentrant: bool = False):
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES), use_reentrant

    def forward(self, x):
        block = lambda h: h + torch.tanh(self.b(h))  # noqa: E731
        return self.c(torch.utils.checkpoint.checkpoint(block, self.a(x), use_reentrant=self.how))


class Named(nn.Module):
    """Reads its layers by name, with hooks that collect features."""

    def __init__(self):
        super().__init__()
        self.body, self.features = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)), {}
        self.head = nn.Linear(12, CLASSES)
        for name in ("0", "2"):
            self.body.get_submodule(name).register_forward_hook(self.keep(name))

    def keep(self, name):
        def hook(_, __, output):
            self.features[name] = output

        return hook

    def forward(self, x):
        self.body(x)
        return self.head(torch.tanh(torch.cat([self.features[k] for k in ("0", "2")], dim=-1)))


class SequentialWithArguments(nn.Sequential):
    def forward(self, x, scale):
        for module in self:
            x = module(x) * scale if isinstance(module, nn.Linear) else module(x)
        return x


WAYS = {
    "dictionary in, dictionary out": Case(
        DictModel,
        lambda: {"batch": {"colour": labels(), "size": labels(classes=4), "numbers": torch.randn(BATCH, 4)}},
    ),
    "optional arguments": Case(
        OptionalArguments,
        lambda: {"x": torch.randn(BATCH, 4), "side": torch.randn(BATCH, 2), "mask": torch.rand(BATCH, 6) > 0.3,
                 "scale": 0.5},
    ),
    "a tuple on request": Case(
        OptionalArguments, lambda: {"x": torch.randn(BATCH, 4), "return_hidden": True},
        cost=lambda o, y: F.cross_entropy(o[0], y, reduction="none") + 0.1 * o[1].square().sum(1),
    ),
    "modules by key": Case(Routed, features()),
    "modules by key, given": Case(Routed, lambda: (torch.randn(BATCH, 4), "lrelu")),
    "lists of parameters": Case(ParameterLists, features()),
    "masked autoencoder": Case(MADE, features(), lambda x: torch.rand(BATCH, 4).double(), "mse"),
    "pruned": Case(pruned, features()),
    "weight norm by hook": Case(lambda: normed(nn.utils.weight_norm), features()),
    "spectral norm by hook": Case(lambda: normed(nn.utils.spectral_norm), features()),
    "spectral norm": Case(lambda: normed(nn.utils.parametrizations.spectral_norm), features()),
    "orthogonal": Case(lambda: normed(nn.utils.parametrizations.orthogonal), features()),
    "orthogonal by Cayley": Case(
        lambda: normed(lambda m: nn.utils.parametrizations.orthogonal(m, orthogonal_map="cayley")), features()
    ),
    "scores of frozen weights": Case(lambda: mlp(nn.ReLU(), LotteryTicket()), features()),
    "hard concrete gates": Case(lambda: mlp(nn.ReLU(), L0Linear()), features(), cost_of=with_l0),
    "Bayes by backprop": Case(
        lambda: nn.Sequential(BayesLinear(4, 6), nn.ReLU(), BayesLinear(6, 3)), features(), cost_of=with_aux(0.01)
    ),
    "checkpointed": Case(Checkpointed, features()),
    "checkpointed, reentrant": Case(
        lambda: Checkpointed(True), features(), verdict="refused", place="use_reentrant=False"
    ),
    "features by hooks": Case(Named, features()),
    "arguments along a sequence": Case(
        lambda: SequentialWithArguments(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
        lambda: (torch.randn(BATCH, 4), torch.rand(BATCH, 1)),
    ),
}  # fmt: skip


PUBLIC: dict[str, Case] = (
    NORMS | QUANTISERS | EXPERTS | DROPPED | TIED | ADAPTERS | PHYSICS | GRAPHS | ATTENTION | CONVOLUTIONS | SEQUENCES
    | CONTRASTS | ITERATED | WAYS
)  # fmt: skip
