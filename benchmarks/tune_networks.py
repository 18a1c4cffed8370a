"""The networks that the Tune mode benchmark trains, each with a batch, a loss, and statistics as of a trained network.

Classifiers take the cross entropy of random labels. The detector takes the sum of its four losses on given boxes, with
the BatchNorms of its backbone trainable and on fixed statistics, as detection toolboxes fine-tune; it draws its
proposals at random, from the same seed in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from zoo_calibrate import calibrate

PROPOSALS = 64
"""How many boxes per image the detector's second stage trains on; torchvision's 512 would bury the backbone."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on.

    Attributes:
        images: ``(N, 3, H, W)``, or a list of ``(3, H, W)`` for a detector.
        targets: Labels, ``(N,)``, or a list of boxes ``(K, 4)`` with labels ``(K,)``.
    """

    images: Any
    targets: Any

    def to(self, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Batch:
        """Return the batch elsewhere; only images and boxes, which are not integers, take ``dtype``."""
        if isinstance(self.images, Tensor):
            images = self.images.to(device, dtype, non_blocking=True, memory_format=layout)
            return Batch(images, self.targets.to(device, non_blocking=True))
        images = [image.to(device, dtype, non_blocking=True) for image in self.images]
        boxes = [{"boxes": t["boxes"].to(device, dtype), "labels": t["labels"].to(device)} for t in self.targets]
        return Batch(images, boxes)

    def first(self, count: int) -> Batch:
        """Return the first images only."""
        return Batch(self.images[:count], self.targets[:count])

    def image_gradients(self) -> Batch:
        """Return the batch with images that take a gradient."""
        if isinstance(self.images, Tensor):
            return Batch(self.images.detach().clone().requires_grad_(), self.targets)
        return Batch([image.detach().clone().requires_grad_() for image in self.images], self.targets)


@dataclass(frozen=True, slots=True)
class Network:
    """A network to fine-tune.

    Attributes:
        name: Its name.
        make: Builds it with random weights.
        detects: Whether it is a detector.
        traced: The part that a symbolic trace can follow and that holds the norms; empty for all of it.
    """

    name: str
    make: Callable[[], nn.Module]
    detects: bool = False
    traced: str = ""

    def built(self, batch: Batch) -> nn.Module:
        """Return the network with calibrated norms, dropout off, and its norms on fixed statistics."""
        torch.manual_seed(0)
        model = self.make().eval()
        calibrate(model, batch.images, seed=0)
        return model

    def batch(self, count: int, size: int) -> Batch:
        """Return random images with random targets."""
        draw = torch.Generator().manual_seed(0)
        if not self.detects:
            labels = torch.randint(1000, (count,), generator=draw)
            return Batch(torch.randn(count, 3, size, size, generator=draw), labels)
        return Batch(
            [torch.rand(3, size, size, generator=draw) for _ in range(count)],
            [_boxes(size, draw) for _ in range(count)],
        )

    def start_training(self, model: nn.Module) -> None:
        """Make the network compute its loss; every norm stays on fixed statistics and dropout stays off."""
        if self.detects:
            for part in (model, model.transform, model.rpn, model.roi_heads):
                part.training = True  # not train(), which would reach the norms  # type: ignore[union-attr]

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the loss, a scalar."""
        if not self.detects:
            return F.cross_entropy(forward(batch.images), batch.targets)
        torch.manual_seed(0)
        return torch.stack(list(forward(batch.images, batch.targets).values())).sum()


def _boxes(size: int, draw: torch.Generator) -> dict[str, Tensor]:
    corner = torch.rand(3, 2, generator=draw) * size / 2
    extent = size / 8 + torch.rand(3, 2, generator=draw) * size / 4
    return {"boxes": torch.cat([corner, corner + extent], 1), "labels": torch.randint(1, 91, (3,), generator=draw)}


def _faster_rcnn() -> nn.Module:
    """Return Faster R-CNN on images as they are, with BatchNorm2d, which torchvision uses without trained weights."""
    return torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        trainable_backbone_layers=5,
        min_size=256,  # where detections are asked for, as calibration does
        _skip_resize=True,  # in training
        box_batch_size_per_image=PROPOSALS,
    )


def _torchvision(name: str) -> Network:
    return Network(name, lambda: torchvision.models.get_model(name, weights=None))


NETWORKS = {
    network.name: network
    for network in (
        *map(_torchvision, ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "resnext50_32x4d")),
        Network("fasterrcnn_resnet50_fpn", _faster_rcnn, detects=True, traced="backbone.body"),
    )
}
DEFAULT = ("resnet50", "mobilenet_v2", "efficientnet_b0", "resnext50_32x4d", "fasterrcnn_resnet50_fpn")
