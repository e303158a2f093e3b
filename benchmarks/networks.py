"""Networks of the benchmarks: plain PyTorch with random weights, in the layer shapes that everybody uses.

Shapes: AlexNet (Krizhevsky 2014, one tower), VGG-16 (Simonyan and Zisserman 2015, configuration D), ResNet (He et
al. 2016, the stride in the 3x3 convolution), ViT-B/16 (Dosovitskiy et al. 2021), BERT base (Devlin et al. 2019).
Weights are seeded and scaled by their fan-in, so that activations stay near 1 and errors are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions before each pooling


def alexnet() -> nn.Module:
    """Five convolutions and three dense layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        nn.Flatten(),
        *(nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
    )


def vgg16() -> nn.Module:
    """Thirteen 3x3 convolutions and three dense layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in VGG16:
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 1000))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution without bias and its batch normalisation."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    def __init__(self, branch: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def basic(inputs: int, width: int, stride: int) -> list[nn.Module]:
    return [*convolution(inputs, width, 3, stride), nn.ReLU(), *convolution(width, width, 3)]


def bottleneck(inputs: int, width: int, stride: int) -> list[nn.Module]:
    narrow = [*convolution(inputs, width, 1), nn.ReLU(), *convolution(width, width, 3, stride), nn.ReLU()]
    return [*narrow, *convolution(width, 4 * width, 1)]


def resnet(branch: Callable[[int, int, int], list[nn.Module]], expansion: int, depths: Sequence[int]) -> nn.Module:
    """A 7x7 stem, four stages of residual blocks, one dense layer."""
    layers: list[nn.Module] = [*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            outputs = width * expansion
            shortcut = [] if stride == 1 and channels == outputs else convolution(channels, outputs, 1, stride)
            layers.append(Residual(branch(channels, width, stride), shortcut))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values from one dense layer or from three."""

    def __init__(self, width: int, heads: int, joined: bool) -> None:
        super().__init__()
        self.heads = heads
        sizes = [3 * width] if joined else [width] * 3
        self.projections = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = [projection(x) for projection in self.projections]
        parts = list(parts[0].chunk(3, dim=-1)) if len(parts) == 1 else parts
        query, key, value = (p.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron with GELU; normalised before (ViT) or after (BERT) each."""

    def __init__(self, width: int, heads: int, hidden: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads, joined=norm_first)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6 if norm_first else 1e-12) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.norms
        if self.norm_first:
            x = x + self.attention(first(x))
            return x + self.mlp(second(x))
        x = first(x + self.attention(x))
        return second(x + self.mlp(x))


class VisionTransformer(nn.Module):
    """ViT: 16x16 patches, a class token, positions, encoder layers, one dense layer on the class token."""

    def __init__(
        self, image: int = 224, patch: int = 16, width: int = 768, depth: int = 12, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, width // 64, 4 * width, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def bert_base() -> nn.Module:
    """The encoder of BERT base on embeddings that are looked up and normalised already."""
    return nn.Sequential(*(EncoderLayer(768, 12, 3072, False) for _ in range(12)))


IMAGE, SENTENCE = (3, 224, 224), (128, 768)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "alexnet": (alexnet, IMAGE),
    "vgg16": (vgg16, IMAGE),
    "resnet18": (lambda: resnet(basic, 1, (2, 2, 2, 2)), IMAGE),
    "resnet50": (lambda: resnet(bottleneck, 4, (3, 4, 6, 3)), IMAGE),
    "vit_b16": (VisionTransformer, IMAGE),
    "bert_base": (bert_base, SENTENCE),
}


def network(name: str, batch: int = 1, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """(module, example input) of a name in NETWORKS; the same numbers for the same seed."""
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # torch's own initialisation takes longer than all of ours
        module = make()
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    for part in module.modules():
        randomize(part, generator)
    return module, torch.randn((batch, *shape), generator=generator)


def randomize(part: nn.Module, generator: torch.Generator) -> None:
    """Random parameters of one module: variance 2 / fan-in before ReLU, normalisations near the identity."""
    match part:
        case nn.Conv2d() | nn.Linear():
            fan_in = part.weight[0].numel()
            part.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if part.bias is not None:
                part.bias.normal_(0, 0.1, generator=generator)
        case nn.BatchNorm2d():
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(1.0, 3.0, generator=generator)
            part.num_batches_tracked.zero_()
            part.weight.uniform_(0.5, 1.0, generator=generator)
            part.bias.normal_(0, 0.1, generator=generator)
        case nn.LayerNorm():
            part.weight.uniform_(0.5, 1.5, generator=generator)
            part.bias.normal_(0, 0.1, generator=generator)
        case VisionTransformer():
            part.token.normal_(0, 0.5, generator=generator)
            part.positions.normal_(0, 0.5, generator=generator)
