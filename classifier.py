"""
A yardstick without Inception's weights: a small classifier, trained on the labels of a data set.

eval_fid.py --features=classifier measures with its features. Training takes a minute or two on a
CPU, once for each data set.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_checkpoint, save_checkpoint
from data import Shuffle, data_checksum, split, to_float
from feature_files import reserved
from processes import barrier
from run import progress


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> pool features (B, 64), None (it has no spatial features),
    class probabilities (B, classes)."""

    pool_dim, spatial_dim = 64, 0

    def __init__(self, img_channels, num_classes):
        super().__init__()
        layers = []
        for c_in, c_out in ((img_channels, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
                       nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(64, num_classes)

    def pool(self, x):
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        pool = self.pool(x)
        return pool, None, self.fc(pool).softmax(dim=1)


def train_classifier(images, labels, num_classes, device, steps=1000, batch=100):
    """-> a Classifier trained on images uint8 (N, H, W, C) and labels int64 (N,), and its accuracy
    on up to 500 of these images that are held out"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier(images.shape[3], num_classes).to(device)
    train, held_out = split(len(images), min(500, len(images) // 5))
    batches, shifts = Shuffle(train, 0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for step in progress(range(steps), desc="training the classifier"):
        which = batches.take(step * batch, batch)
        x = to_float(images[which], device).roll(tuple(shifts.integers(-2, 3, 2)), dims=(2, 3))  # by up to 2 pixels
        loss = F.cross_entropy(net.fc(net.pool(x)), torch.from_numpy(labels[which]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = np.sort(held_out)  # the images may be mapped from a file: in its order
    return net, accuracy(net.eval(), images[held_out], labels[held_out], device)


@torch.no_grad()
def accuracy(net, images, labels, device="cpu", batch=100):
    """The share of images uint8 (N, H, W, C) that the network gives their label (N,)."""
    probs = [net(to_float(images[i:i + batch], device))[2] for i in range(0, len(images), batch)]
    return float((torch.cat(probs).argmax(1).cpu().numpy() == labels).mean())


def find_classifier(folder, name, images, labels, num_classes, device, rank):
    """-> the Classifier of the data set `name` with these images and labels, and its accuracy

    Process 0 trains it if `folder`, a Path, does not have it yet.
    """
    path = folder / f"classifier-{name}-{data_checksum(images, labels):08x}.pt"
    if rank == 0 and not path.exists():
        with reserved(path):
            net, share = train_classifier(images, labels, num_classes, device)
            save_checkpoint(path, dict(made_by="eval_fid", model=net.state_dict(), accuracy=share))
    barrier()
    checkpoint = load_checkpoint(path, "eval_fid")
    net = Classifier(images.shape[3], num_classes)
    net.load_state_dict(checkpoint["model"])
    return net.to(device).eval().requires_grad_(False), checkpoint["accuracy"]
