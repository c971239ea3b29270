"""Models as people write them, tiny: what must train by equilibrium propagation unchanged. Plain torch only."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

BATCH, CLASSES, VOCABULARY = 4, 3, 11


# Images.


def conv_norm(inner: int, outer: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outer)]


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inner, outer, stride=stride)
        self.conv2, self.bn2 = conv_norm(outer, outer)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inner != outer
        self.downsample = nn.Sequential(*conv_norm(inner, outer, 1, stride)) if changes else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """He et al. 2015; `ResNet([2, 2, 2, 2])` is ResNet-18, with `width` 64 the original."""

    def __init__(self, depths: Sequence[int], width: int = 4):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, width, 7, 2)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inner, stages = width, []
        for stage, depth in enumerate(depths):
            outer, first = width * 2**stage, 1 if stage == 0 else 2
            stages.append(BasicBlock(inner, outer, first))
            stages += [BasicBlock(outer, outer, 1) for _ in range(depth - 1)]
            inner = outer
        self.layers, self.avgpool = nn.Sequential(*stages), nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inner, CLASSES)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


class VGG(nn.Module):
    """Simonyan and Zisserman 2014: convolutions, max pooling ("M") and a classifier with dropout."""

    def __init__(self, plan: Sequence[int | str], size: int, dropout: float = 0.5):
        super().__init__()
        layers: list[nn.Module] = []
        inner = 3
        for item in plan:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2, 2))
                size //= 2
            else:
                layers += [nn.Conv2d(inner, item, 3, padding=1), nn.ReLU(inplace=True)]
                inner = item
        self.features = nn.Sequential(*layers)
        head = [nn.Linear(inner * size * size, 8), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(8, CLASSES)]
        self.classifier = nn.Sequential(*head)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class Inverted(nn.Module):
    """MobileNetV2's block: widen, one filter a channel, narrow; with a skip where the shapes allow."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        wide = 2 * inner
        self.conv = nn.Sequential(
            *conv_norm(inner, wide, 1), nn.ReLU6(inplace=True),
            *conv_norm(wide, wide, 3, stride, groups=wide), nn.ReLU6(inplace=True),
            *conv_norm(wide, outer, 1),
        )  # fmt: skip
        self.skip = stride == 1 and inner == outer

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [Inverted(4, 4, 1), Inverted(4, 6, 2), Inverted(6, 6, 1)]
        self.features = nn.Sequential(*conv_norm(3, 4, stride=2), nn.ReLU6(inplace=True), *blocks)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class UNet(nn.Module):
    """Ronneberger et al. 2015, two levels: what went down is concatenated to what comes up; one class a pixel."""

    def __init__(self):
        super().__init__()
        self.down, self.inner = self.block(1, 3), self.block(3, 6)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.last, self.head = self.block(6, 3), nn.Conv2d(3, CLASSES, 1)

    @staticmethod
    def block(inner, outer):
        first = [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Conv2d(outer, outer, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.inner(self.pool(skip)))
        return self.head(self.last(torch.cat([skip, x], dim=1)))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020: patches, a class token, positions, pre-norm blocks."""

    def __init__(self, width: int = 6, depth: int = 1):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList([PreNorm(width, FusedAttention(width)) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# Sequences.


class SelfAttention(nn.Module):
    """`F.scaled_dot_product_attention` with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int = 2, causal: bool = False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, d // self.heads).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, d))


class FusedAttention(SelfAttention):
    """The same, with the three unpacked from one tensor."""

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


class MultiHead(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class PreNorm(nn.Module):
    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = attention, feed_forward(width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNorm(PreNorm):
    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """Some blocks between a first layer and the mean over the sequence."""

    def __init__(self, *blocks: nn.Module, width: int = 6):
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(4, width), nn.Sequential(*blocks), nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.first(x)).mean(1))


def torch_encoder(layers: int = 1, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class GPT(nn.Module):
    """A causal character model whose output weights are its embeddings; logits `[batch, time, vocabulary]`."""

    def __init__(self, width: int = 6, depth: int = 2, context: int = 5):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([PreNorm(width, SelfAttention(width, causal=True)) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Masked(nn.Module):
    """Padding is masked, and left out of the mean."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, CLASSES)
        self.attention, self.mlp = nn.MultiheadAttention(6, 2, batch_first=True), feed_forward(6)

    def forward(self, tokens, mask):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
        x = x + self.mlp(x)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weights).sum(1) / weights.sum(1))


class Recurrent(nn.Module):
    """The last hidden state of a recurrent network, kept whole by itself: torch's own modules are leaves."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(4, 5), kind(5, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        output, _ = self.rnn(torch.tanh(self.first(x)))
        return self.head(output[:, -1])


class Hidden(Recurrent):
    """As people write it too: the hidden state `[layers, batch, width]`, not the outputs."""

    def forward(self, x):
        _, hidden = self.rnn(torch.tanh(self.first(x)))
        hidden = hidden[0] if isinstance(self.rnn, nn.LSTM) else hidden
        return self.head(hidden[-1])


# What tracing cannot look into, kept whole.


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x * x


class Cubed(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


class Branching(nn.Module):
    """Its depth depends on its input."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        for _ in range(2 if x.mean() < 100 else 1):
            x = torch.tanh(self.inner(x))
        return x


class Noisy(nn.Module):
    """Noise of its own making."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


# Unusual calls and outputs.


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(10, CLASSES)

    def forward(self, image, text, scale=None):
        left, right = torch.tanh(self.left(image)), torch.tanh(self.right(text))
        return self.head(torch.cat([left, right if scale is None else right * scale], -1))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.place = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return torch.cat([self.classes(h), self.place(torch.sigmoid(h))], 1)


class Bare(nn.Module):
    """Parameters of its own, outside any module."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 6) / 2), nn.Parameter(torch.randn(6, CLASSES) / 2)
        self.b1, self.gain = nn.Parameter(torch.zeros(6)), nn.ParameterList([nn.Parameter(torch.ones(6))])

    def forward(self, x):
        h = torch.tanh(x @ self.w1 + self.b1) * self.gain[0]
        return torch.einsum("bi,ij->bj", h, self.w2)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, CLASSES))


# The table.


@dataclass(frozen=True)
class Entry:
    """A model with what it is fed; `cost` of None is the cross-entropy over dimension 1 of the output."""

    model: Callable[[], nn.Module]
    x: Callable[[], Tensor | tuple | dict]
    target: Callable[[Tensor], Tensor] | None = None
    cost: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"
    leaves: tuple[type[nn.Module] | str, ...] = ()
    beta: float = 1e-3

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        """The model, an input and a target."""
        torch.manual_seed(seed)
        model, x = self.model().to(dtype), cast(self.x(), dtype)
        output = call(copy.deepcopy(model), x).detach()
        labels = torch.randint(output.shape[1], (len(output), *output.shape[2:]))
        return model, x, labels if self.target is None else self.target(output)

    def loss(self, model: nn.Module, x, target: Tensor) -> Tensor:
        """The mean cost, by torch alone."""
        output = call(model, x)
        if self.cost == "cross_entropy":
            return F.cross_entropy(output, target)
        return F.mse_loss(output, target) if self.cost == "mse" else self.cost(output, target).mean()


def call(model: nn.Module, x):
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def cast(x, dtype: torch.dtype):
    if isinstance(x, dict):
        return {k: cast(v, dtype) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(cast(v, dtype) for v in x)
    return x.to(dtype) if x.is_floating_point() else x


def image(channels: int, size: int, batch: int = BATCH):
    return lambda: torch.randn(batch, channels, size, size)


def features(*shape: int):
    return lambda: torch.randn(BATCH, *(shape or (4,)))


def tokens():
    return torch.randint(VOCABULARY, (BATCH, 5))


def padded():
    return {"tokens": tokens(), "mask": torch.arange(5) < torch.tensor([[5], [3], [4], [1]])}


def next_tokens(logits: Tensor, target: Tensor) -> Tensor:
    """Language modelling: logits [batch, time, vocabulary], target [batch, time]."""
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


def next_tokens_but_padding(logits: Tensor, target: Tensor) -> Tensor:
    """Positions with the target -100 cost nothing."""
    each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
    return each.sum(1) / (target != -100).sum(1)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=output.dtype)
    return F.cross_entropy(output, target, weight=weight, reduction="none")


def two_costs(output: Tensor, target: Tensor) -> Tensor:
    """A class and a place; the output is both, side by side."""
    classes, place = output.split([CLASSES, 2], 1)
    return F.cross_entropy(classes, target[:, 0].long(), reduction="none") + (place - target[:, 1:]).square().sum(1)


def labels_of_tokens(logits: Tensor) -> Tensor:
    return torch.randint(VOCABULARY, logits.shape[:2])


def some_labels_of_tokens(logits: Tensor) -> Tensor:
    return labels_of_tokens(logits).index_fill(1, torch.tensor([0, 3]), -100)


VGG_PLAN = (3, "M", 4, "M", 5, 5, "M")

ZOO: dict[str, Entry] = {
    "ResNet-18": Entry(lambda: ResNet([2, 2, 2, 2]), image(3, 32, 8), beta=4e-6),
    "VGG": Entry(lambda: VGG(VGG_PLAN, 8), image(3, 8)),
    "MobileNet": Entry(MobileNet, image(3, 8), beta=1e-4),
    "U-Net": Entry(UNet, image(1, 4)),
    "ViT": Entry(ViT, image(1, 4)),
    "pre-norm, MultiheadAttention": Entry(lambda: Encoder(PreNorm(6, MultiHead(6))), features(3, 4)),
    "post-norm, MultiheadAttention": Entry(lambda: Encoder(PostNorm(6, MultiHead(6))), features(3, 4)),
    "pre-norm, sdpa": Entry(lambda: Encoder(PreNorm(6, SelfAttention(6))), features(3, 4)),
    "post-norm, sdpa": Entry(lambda: Encoder(PostNorm(6, SelfAttention(6))), features(3, 4)),
    "TransformerEncoderLayer, post": Entry(lambda: Encoder(*torch_encoder().layers), features(3, 4)),
    "TransformerEncoder, pre": Entry(lambda: Encoder(torch_encoder(norm_first=True)), features(3, 4)),
    "GPT": Entry(GPT, tokens, labels_of_tokens, next_tokens),
    "GPT, ignore_index": Entry(GPT, tokens, some_labels_of_tokens, next_tokens_but_padding),
    "padding mask": Entry(Masked, padded),
    "LSTM": Entry(lambda: Recurrent(nn.LSTM), features(3, 4)),
    "GRU": Entry(lambda: Recurrent(nn.GRU), features(3, 4)),
    "LSTM, hidden state": Entry(lambda: Hidden(nn.LSTM), features(3, 4)),
    "GRU, hidden state": Entry(lambda: Hidden(nn.GRU), features(3, 4)),
    "autograd.Function": Entry(lambda: mlp(Cubed(), nn.Linear(6, 6)), features(), leaves=(Cubed,)),
    "control flow": Entry(lambda: mlp(Branching()), features(), leaves=(Branching,)),
    "dropout": Entry(lambda: mlp(nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 6), nn.AlphaDropout(0.2)), features()),
    "noise": Entry(lambda: mlp(nn.Tanh(), Noisy()), features(), leaves=(Noisy,)),
    "two inputs": Entry(TwoTowers, lambda: (torch.randn(BATCH, 4), torch.randn(BATCH, 2))),
    "dict of inputs": Entry(
        TwoTowers, lambda: {k: torch.randn(BATCH, n) for k, n in (("text", 2), ("image", 4), ("scale", 1))}
    ),
    "two heads": Entry(
        TwoHeads, features(), lambda s: torch.cat([torch.randint(CLASSES, (BATCH, 1)), torch.randn(BATCH, 2)], 1),
        two_costs,
    ),
    "regression": Entry(lambda: mlp(nn.Tanh()), features(), torch.randn_like, "mse"),
    "class weights": Entry(lambda: mlp(nn.Tanh()), features(), cost=weighted),
    "label smoothing": Entry(
        lambda: mlp(nn.Tanh()), features(), cost=nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
    ),
    "frozen parameters": Entry(lambda: frozen(VGG(VGG_PLAN, 8), "features"), image(3, 8)),
    "frozen in the middle": Entry(lambda: frozen(mlp(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()), "2"), features()),
    "parameters outside a module": Entry(Bare, features()),
    "weight norm": Entry(lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)), features()),
    "spectral norm": Entry(lambda: mlp(nn.Tanh(), spectral_norm(nn.Linear(6, 6)), nn.Tanh()), features()),
    "orthogonal": Entry(lambda: mlp(nn.Tanh(), orthogonal(nn.Linear(6, 6)), nn.Tanh()), features()),
}  # fmt: skip
