"""How robust is a trained classifier? The paper's attacks and DDN; the paper's Tables 1 and 2, Figures 2 and 4.

    python eval.py results/*.pt --n 100             eight networks in seven minutes on one CPU core
    python eval.py runs/*.pt --n 100 --attacks deepfool,cw,paper,ddn --figures pictures --json all.json
    python eval.py all.json other.json              the tables of these rows again, without an attack

Prints the tables, the published values in brackets: a line for each defense and network, with mean±standard deviation
over checkpoints that differ only in the seed. The attacks are functions of any classifier f, images x and labels y.
"""
import argparse
import functools
import glob
import html
import json
import math
import os
import statistics
import struct
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's only complaint where numpy is not

import torch
import torch.nn.functional as F
from torch import nn

import data
from advcritic import (as_confidence, attack_step, boundaries, boundary_distance, checked, closest_class, expect,
                       expect_images, leaf, lenet, mlp, per_image, pick)

NETWORKS = {"lenet": lenet, "mlp": mlp}
DATA = ("mnist", "drawn")


# --- Eq. 8: rho ---------------------------------------------------------------------------------------------------

def wide(x):
    """x in float32 at least, so that sums over half precision are right."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2(v):
    """|v|_2 of each image: v (N,...) -> (N,)."""
    return wide(v).flatten(1).norm(dim=1)


def unit(v):
    """v (N,...) divided by its l2 length, image by image."""
    return v / per_image(l2(v).clamp(min=1e-12), v)


def rho(x, x_adv):
    """|x_adv - x|_2 / |x|_2 of each image (Eq. 8 before the mean): (N,), nan where x is black (norm 0)."""
    expect_images(x)
    expect(isinstance(x_adv, torch.Tensor) and x_adv.shape == x.shape, "x_adv", x_adv, f"x's shape {tuple(x.shape)}")
    norm = l2(x)
    return torch.where(norm > 0, l2(wide(x_adv) - wide(x)) / norm, torch.nan)


def mean_rho(x, length):
    """Eq. 8 from the lengths (N,) of the perturbations, without infinite ones and without black images."""
    ratio = length / l2(x)
    return ratio[ratio.isfinite()].mean().item()


# --- The class that f gives to an image ---------------------------------------------------------------------------

@torch.no_grad()
def batched_logits(f, x):
    """f(x) (N,K), computed in parts that fit into memory; for no images, which not every f can take, (0,2)."""
    expect_images(x)
    if len(x) == 0:
        return wide(x).new_zeros(0, 2)
    return torch.cat([checked(f, part.clone()) for part in x.split(500)])  # clone: for an f that works in place


def classify(f, x, y):
    """The class (N,) that f gives to each image; -1, no class, where its largest logit is infinite or not a number.
    y is only checked: ValueError unless it holds N labels that f knows."""
    logits = batched_logits(f, x)
    check_labels("y", y, *logits.shape)
    largest, label = logits.max(1)
    return torch.where(largest.isfinite(), label, -1)


def share(which):
    """The share of True among which (N,), a float; nan of none. A count: not every device has float64 for a mean."""
    return which.sum().item() / len(which) if len(which) else math.nan


def error_rate(f, x, y):
    """The share of the images x (N,...) that f does not classify as y (N,), a float in [0,1]."""
    return share(classify(f, x, y) != y)


def fooled(f, x_adv, y):
    """True (N,) where f classifies x_adv, with a finite logit, as another class than y."""
    label = classify(f, x_adv, y)
    return (label != y) & (label >= 0)


def check_images(x):
    """ValueError unless x holds floating-point images (N,...) in [0,1]."""
    expect_images(x)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"x: values from {x.min().item():.7g} to {x.max().item():.7g}, expected images in [0,1]")


def check_labels(name, y, n, num_classes):
    """ValueError unless y holds n integers in [0, num_classes)."""
    ok = isinstance(y, torch.Tensor) and y.shape == (n,) and not y.is_floating_point() and y.dtype != torch.bool
    expect(ok, name, y, f"integers of shape ({n},)")
    if n and not 0 <= y.min() <= y.max() < num_classes:
        raise ValueError(f"{name}: values from {y.min()} to {y.max()}, expected classes 0 to {num_classes - 1}")


# --- What holds for every attack ----------------------------------------------------------------------------------
#
# f is any callable, images -> logits (N,K), that treats each image by itself; x (N,...) floating-point images in [0,1];
# y or target integers (N,). ValueError for anything else, and where the logits at x or their gradient are not finite.
# Nothing is changed: x, f's mode, weights and their gradients; no_grad and inference mode do not matter. The attack
# computes in float32 at least, f gets images in x's type, and x_adv (N,...) in [0,1] is of x's type, detached.

def accept(f, x, name, y):
    """Checks what an attack was given. Returns g, which is f for images of any precision, and f's logits at x."""
    def g(images):
        return checked(f, images.to(x.dtype, copy=True)).to(images.dtype)
    check_images(x)
    if len(x) == 0:  # as in batched_logits
        return g, wide(x).new_zeros(0, 2)
    with torch.enable_grad():
        start = leaf(wide(x))
        logits = g(start)
        check_labels(name, y, *logits.shape)
        if not logits.isfinite().all():
            raise ValueError("f: its logits at x are not finite")
        grad = None
        if logits.requires_grad:
            grad, = torch.autograd.grad(logits.sum(), start, allow_unused=True)
    if grad is None:
        raise ValueError("f: its logits have no gradient, expected f without no_grad and detach")
    if not grad.isfinite().all():
        raise ValueError("f: the gradient of its logits at x is not finite")
    return g, logits.detach()


def untargeted(method):
    """Decorates an attack method(f, x, y, ...). It gets the images that f classifies as y. The others come back as they
    are, and so do those on which it fails, judged by f on x_adv as it is returned."""
    @functools.wraps(method)
    def attack(f, x, y, *args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            g, logits = accept(f, x, "y", y)
            x_adv, right = wide(x).clone(), logits.argmax(1) == y
            if right.any():
                x_adv[right] = method(g, x_adv[right], y[right].long(), *args, **kwargs)
            x_adv = x_adv.clamp(0, 1).to(x.dtype)
            return torch.where(per_image(fooled(f, x_adv, y), x), x_adv, x)
    return attack


def own_and_others(logits, y):
    """f_y (N,), and all logits (N,K) with -inf in its place, for a maximum over the other classes."""
    return pick(logits, y), logits.scatter(1, y[:, None], -torch.inf)


# --- The attacks --------------------------------------------------------------------------------------------------

@untargeted
def deepfool(f, x, y, steps=500, max_step=0.1, overshoot=0.02):
    """l2 DeepFool (Moosavi-Dezfooli, Fawzi and Frossard 2016), to the closest boundary, the class chosen anew at
    each step, at most `steps` times:

    r += (min(|f_k - f_y| / |w|, max_step) + 1e-4) w / |w|,   w = grad f_k - grad f_y,   all at x + r

    until x_adv = clamp(x + (1 + overshoot) r) is not classified as y; r is taken back from the clamped image. The
    1e-4 makes the step cross the boundary on which it would end. max_step=0.1 is the paper's, None takes full steps.
    """
    x_adv, r, live = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        gap, norm, w = boundaries(f, (x + r)[live], y[live])
        length = boundary_distance(gap, norm, y[live]).amin(1).clamp(max=max_step or math.inf)
        r_i = per_image(length + 1e-4, w) * unit(w)
        x_i = (x[live] + (1 + overshoot) * (r[live] + r_i)).clamp(0, 1)
        x_adv[live] = x_i
        r[live] = (x_i - x[live]) / (1 + overshoot)
        live = live[f(x_i).argmax(1) == y[live]]
        if len(live) == 0:
            break
    return x_adv


@untargeted
def carlini_wagner(f, x, y, steps=1000, search_steps=9, lr=0.01):
    """The untargeted l2 attack of Carlini and Wagner (2017). Adam on w, with x_adv = (tanh w + 1) / 2, minimises

    |x_adv - x|_2^2 + c max(0, f_y - max_{k != y} f_k)

    from w = atanh(0.999999 (2x - 1)): without the factor a pixel of 0 or 1 has no gradient. c begins at 1e-3; after
    each of the search steps it is bisected, or multiplied by 10 as long as no c has fooled f. x_adv is the closest
    image that fooled f. Every search step runs to its end, without the original's early abort.
    """
    x_adv, shortest = x.clone(), x.new_full((len(x),), torch.inf)  # shortest: |x_adv - x|^2
    low, c, high = (x.new_full((len(x),), value) for value in (0, 1e-3, torch.inf))
    for _ in range(search_steps):
        w = (0.999999 * (2 * x - 1)).atanh().requires_grad_()
        adam = torch.optim.Adam([w], lr=lr)
        found = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(steps):
            with torch.enable_grad():
                x_i = (w.tanh() + 1) / 2
                f_y, others = own_and_others(f(x_i), y)
                gap = f_y - others.amax(1)
                square = (x_i - x).flatten(1).square().sum(1)
                w.grad, = torch.autograd.grad((square + c * gap.clamp(min=0)).sum(), w)
            closer = (gap < 0) & (square < shortest)
            x_adv = torch.where(per_image(closer, x), x_i, x_adv)
            shortest = torch.where(closer, square, shortest)
            found |= gap < 0
            adam.step()
        low = torch.where(found, low, c)
        high = torch.where(found, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return x_adv


@untargeted
def ddn(f, x, y, steps=1000):
    """The l2 attack by decoupled direction and norm (Rony et al. 2019). From r = 0 and length 1, in each step:

    r += alpha g / |g|,   g = grad NLL(f(x + r), y),   alpha from 1 to 0.01 along a cosine
    length *= 0.95 if f(x + r) was not y, else 1.05;   r is set to this length, then x + r clamped to [0,1].

    x_adv is the closest image that fooled f.
    """
    x_adv, r = x.clone(), torch.zeros_like(x)
    length, shortest = x.new_ones(len(x)), x.new_full((len(x),), torch.inf)
    for step in range(steps):
        with torch.enable_grad():
            x_i = (x + r).requires_grad_()
            f_y, others = own_and_others(f(x_i), y)
            # grad NLL is (1 - p_y) times this gradient: the same direction, also where float32 rounds p_y to 1.
            grad, = torch.autograd.grad((others.logsumexp(1) - f_y).sum(), x_i)
        success, norm = others.amax(1) > f_y, l2(r)
        closer = success & (norm < shortest)
        x_adv = torch.where(per_image(closer, x), x_i, x_adv)
        shortest = torch.where(closer, norm, shortest)
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        length = torch.where(success, 0.95 * length, 1.05 * length).clamp(max=x[0].numel() ** 0.5)
        r = (x + per_image(length, x) * unit(r + alpha * unit(grad))).clamp(0, 1) - x
    return x_adv


def high_confidence_attack(f, x, target, confidence, steps=500, max_step=0.1, overshoot=0.02):
    """The paper's attack as its tests use it (Section 5): Eq. 7 in small steps, each projected to [0,1], until f
    classifies x_adv as the target with a probability of at least confidence, or `steps` are taken.

    x_adv <- clamp(x_adv + (1 + overshoot) r_i),   r_i by Eq. 7 at x_adv (attack_step), cut to |r_i|_2 <= max_step

    confidence in (0,1], a float or (N,); max_step None takes full steps. An attack that fails keeps its last iterate.
    """
    with torch.inference_mode(False), torch.no_grad():
        g, _ = accept(f, x, "target", target)
        x_adv, target, C = wide(x).clone(), target.long(), as_confidence(confidence, wide(x))
        if not ((C > 0) & (C <= 1)).all():
            raise ValueError(f"confidence: values from {C.min():.7g} to {C.max():.7g}, expected probabilities in (0,1]")
        live = torch.arange(len(x), device=x.device)
        for _ in range(steps):
            if len(live) == 0:
                break
            r_i, p, logits = attack_step(g, x_adv[live], target[live], C[live])
            going = (p < C[live]) | (logits.argmax(1) != target[live])
            live, r_i = live[going], r_i[going]
            r_i = per_image(l2(r_i).clamp(max=max_step or math.inf), r_i) * unit(r_i)
            r_i = r_i.nan_to_num()  # an image that has lost its gradient stays where it is
            x_adv[live] = (x_adv[live] + (1 + overshoot) * r_i).clamp(0, 1)
        return x_adv.to(x.dtype)


@untargeted
def paper_attack(f, x, y):
    """The paper's attack in its test protocol (Section 5): high_confidence_attack to the class that is closest at x,
    and to the confidence that f has at x. x_adv also where it is the target but short of the confidence."""
    target = closest_class(f, x, y)
    x_adv = high_confidence_attack(f, x, target, f(x).softmax(1).amax(1))
    return torch.where(per_image(f(x_adv).argmax(1) == target, x), x_adv, x)


ATTACKS = {"deepfool": deepfool, "cw": carlini_wagner, "paper": paper_attack, "ddn": ddn}


# --- Measuring a classifier ---------------------------------------------------------------------------------------

def measure(f, x, y, method, title=None):
    """Attacks the images x with method(f, x, y); with a title it shows its progress on a terminal. A dict:

    x_adv    (N,...) what method returned; all that follows is found from it alone
    length   (N,) |x_adv - x|_2; 0 where f is wrong by itself, infinite where x_adv does not fool f or leaves [0,1]
    rho      Eq. 8, without the images that were not fooled; failed: their number; seconds: wall-clock time
    """
    check_images(x)
    right = classify(f, x, y) == y
    size = 2000 if x.is_cuda else 50
    start, parts = time.perf_counter(), [x[:0]]
    for i in range(0, len(x), size):
        if title and sys.stderr.isatty():
            left = (time.perf_counter() - start) * (len(x) / i - 1) if i else math.nan
            print(f"\r{title}: {i} of {len(x)} images, {left:.0f} s left\033[K", end="", file=sys.stderr, flush=True)
        some = slice(i, i + size)
        part = method(f, x[some].clone(), y[some].clone())  # clones, for one that works in place
        ok = isinstance(part, torch.Tensor) and (part.shape, part.dtype) == (x[some].shape, x.dtype)
        expect(ok, "method", part, f"images like x, {x.dtype} of shape {tuple(x[some].shape)}")
        parts.append(part)
    if title and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    x_adv = torch.cat(parts).detach()
    in_box = (x_adv == x_adv.clamp(0, 1)).flatten(1).all(1)
    done = fooled(f, x_adv, y) & in_box
    length = torch.where(done, l2(wide(x_adv) - wide(x.detach())), torch.inf)
    length = torch.where(right, length, 0)
    return dict(x_adv=x_adv, length=length, rho=mean_rho(x, length), failed=length.isinf().sum().item(),
                seconds=time.perf_counter() - start)


def vote(x, x_train, y_train, k=5):
    """The class (N,) of images x by the vote of their k nearest training images in l2; ties go to the nearest."""
    weight = 1 + 0.1 * 0.5 ** torch.arange(k, device=x.device, dtype=torch.float32)  # 1.1, 1.05, ...: for the ties
    nearest = torch.cat([torch.cdist(part.flatten(1), x_train.flatten(1)).topk(k, largest=False).indices
                         for part in x.split(250)])
    return (F.one_hot(y_train[nearest], int(y_train.max()) + 1) * weight[:, None]).sum(1).argmax(1)


LENGTHS = (1.0, 1.25, 1.5)  # in l2, at which the accuracy is reported


def evaluate(f, x, y, attacks, x_train, y_train, title):
    """What the tables say of f on the images x, y under the named attacks, by their headings. "length" (N,) is that of
    each image's smallest perturbation by all attacks but the paper's, infinite where all failed, "worst" its rho."""
    runs = {name: measure(f, x, y, ATTACKS[name], f"{title} {name}") for name in attacks}
    row = {name: run["rho"] for name, run in runs.items()}
    row["failed"] = {name: run["failed"] for name, run in runs.items()}
    row["seconds"] = {name: run["seconds"] for name, run in runs.items()}
    lengths = [run["length"] for name, run in runs.items() if name != "paper"]
    if lengths:
        row["length"] = torch.stack(lengths).amin(0)
        row["worst"] = mean_rho(x, row["length"])
        for length in LENGTHS:
            row[f"at {length} %"] = 100 * share(row["length"] > length)
    if "paper" in runs:
        row.update(compare_with_neighbours(f, x, y, runs["paper"], x_train, y_train))
    return row


def compare_with_neighbours(f, x, y, run, x_train, y_train):
    """Table 2 by a vote of the nearest training images, on the images that f gets right and the paper's attack moved
    to its target; and two controls of this vote: the clean images, and random noise of the same length."""
    moved = (classify(f, x, y) == y) & run["length"].isfinite()
    x, x_adv, y = x[moved], run["x_adv"][moved], y[moved]
    before, after = (batched_logits(f, images).softmax(1).max(1) for images in (x, x_adv))
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
    noise = unit(noise) * per_image(l2(x_adv - x), x)
    voted, clean, noisy = (vote(images, x_train, y_train) for images in (x_adv, x, x + noise))
    return {"looks like target %": 100 * share(voted == after.indices),
            "looks like original %": 100 * share(voted == y),
            "clean error %": 100 * share(clean != y),
            "noise: original %": 100 * share(noisy == y),
            "reached %": 100 * share(after.values >= before.values - 1e-6)}


# --- Networks and checkpoints -------------------------------------------------------------------------------------

class ConvPool(nn.Module):
    """A Conv2d(1, 32, 5) and then MaxPool2d(2), for a CPU: (N,1,28,28) -> (N,32,12,12); a training step of LeNet takes
    22% less time. A 6x6 patch of x, taken at every other pixel, holds the four 5x5 patches of a pooling window. So one
    matrix product, with four copies of each kernel shifted within 6x6, gives the window's four values; the largest
    stays, and of equals the first, as in MaxPool2d."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        patches = x.squeeze(1).unfold(1, 6, 2).unfold(2, 6, 2).flatten(3)                          # (N,12,12,36)
        kernels = torch.cat([F.pad(self.weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)])
        values = F.linear(patches, kernels.flatten(1)).unflatten(3, (4, -1))                       # (N,12,12,4,32)
        return (values.max(3).values + self.bias).permute(0, 3, 1, 2)


def network(arch, device="cpu"):
    """A fresh classifier on the device; on a CPU LeNet begins with ConvPool, the same function of the same weights."""
    with torch.device("cpu"):  # and float32, whatever torch's defaults are
        f = NETWORKS[arch]().to(torch.float32)
    if arch == "lenet" and torch.device(device).type == "cpu":
        f[0], f[1] = ConvPool(f[0]), nn.Identity()
    return f.to(device)


def read_checkpoint(path):
    """The dict in a checkpoint of train.py, on the CPU, with its settings and finite weights of f at least. Runs no
    code from the file. OSError where it cannot be read, ValueError where it is no such checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = {name: checkpoint["settings"][name] for name in ("arch", "defense", "seed", "epochs", "data")}
        network(settings["arch"]).load_state_dict(checkpoint["f"])
        finite = all(part.isfinite().all() for part in checkpoint["f"].values())
        if damaged or settings["data"] not in DATA or not finite:
            raise ValueError("it is damaged, its data unknown or a weight not finite")
        return checkpoint
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything, from the unpickler to load_state_dict
        raise ValueError(f"{path} is not a checkpoint of train.py, or a broken one ({reason(error)})") from None


def reason(error):
    """The kind of an exception, and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).strip()[:120]}".split("\n")[0]


def load_checkpoint(path, device="cpu"):
    """The classifier of a checkpoint of train.py, full or weights-only, and its settings: f (in eval mode), dict, its
    "epochs" such as "3 of 100" where the run did not come to its end. Errors as read_checkpoint has them."""
    checkpoint = read_checkpoint(path)
    f = network(checkpoint["settings"]["arch"], device)
    f.load_state_dict(checkpoint["f"])
    info = checkpoint["settings"]
    if "log" in checkpoint:
        done = max((row["epoch"] for row in checkpoint["log"]), default=0)
        if done < info["epochs"]:
            info["epochs"] = f"{done} of {info['epochs']}"
    return f.eval(), info


# --- Tables 1 and 2 -----------------------------------------------------------------------------------------------

PUBLISHED_COLUMNS = ("test error %", "deepfool", "cw", "paper", "looks like target %", "looks like original %")
PUBLISHED = {  # the paper's values, in this order
    "mlp reference": (1.46, .131, .124, .173, 0.57, 98.74), "lenet reference": (0.64, .157, .148, .207, 2.54, 96.53),
    "mlp at": (0.90, .228, .210, .299, 19.02, 77.21), "lenet at": (0.55, .215, .191, .286, 19.1, 75.94),
    "mlp vat": (0.84, .244, .215, .355, 35.08, 59.68), "lenet vat": (0.60, .225, .195, .330, 26.8, 67.73),
    "mlp margin": (0.84, .262, .230, .453, 60.47, 34.52), "lenet margin": (0.54, .248, .225, .470, 81.77, 13.15),
    "mlp critic": (1.18, .290, .272, .575, 87.99, 9.86), "lenet critic": (0.93, .288, .278, .590, 92.29, 6.51)}


def grouped(rows):
    """Rows that differ in the seed alone together. ValueError where two are the same."""
    groups = {}
    for row in rows:
        group = groups.setdefault(json.dumps({**row["settings"], "seed": None}, sort_keys=True), [])
        if any(row["settings"] == other["settings"] for other in group):
            raise ValueError(f"{row['checkpoint']} is given twice, or another file has the same settings and seed")
        group.append(row)
    return list(groups.values())


def cell(group, name):
    """The mean of one figure over the rows of a group, ± its standard deviation, and the published value."""
    values = [row[name] for row in group]
    digits = {"test error %": 2, "clean error %": 2}.get(name, 1 if "%" in name else 3)
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(group) > 1 and all(map(math.isfinite, values)):
        text += f"±{statistics.stdev(values):.{digits}f}"
    if name in group[0]["published"]:
        text += f" ({group[0]['published'][name]:.{digits}f})"
    return text


def table(groups, names):
    """Lines of text, one for each group of rows that differ in the seed: its name, and the figures of these names."""
    rows = [["", "seeds", *names]]
    rows += [[group[0]["name"], str(len(group)), *(cell(group, name) for name in names)] for group in groups]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for name, *others in rows]


def report(groups, attacks, caption):
    """Lines of text: Table 1 and Table 2, as far as the attacks allow."""
    smallest = ", ".join(name for name in attacks if name != "paper")
    columns = ["worst", *(f"at {length} %" for length in LENGTHS)] if smallest else []
    lines = [f"Table 1: test error, and rho on {caption} (published)",
             *table(groups, ["test error %", *columns, *attacks]),
             "rho: mean |x_adv - x| / |x|, 0 where f is wrong by itself, without the images that were not fooled"]
    if smallest:
        lines.append(f"worst: the smallest perturbation of each image by {smallest}; at 1.5: the accuracy left under "
                     "those of up to length 1.5")
    for group in groups:
        for row in group:
            lines += [f"{row['checkpoint']}: {count} images were not fooled by {name}: it failed, this is no robustness"
                      for name, count in row["failed"].items() if count]
    if "paper" in attacks:
        columns = ["looks like target %", "looks like original %", "clean error %", "noise: original %", "reached %"]
        lines += ["", f"Table 2: {caption} under the paper's attack; the 5 nearest training images vote for people",
                  *table(groups, columns), "clean error: of this vote on clean images; noise: on random noise of the "
                  "attack's length; reached: within 1e-6 of the clean confidence"]
    return lines


def save_json(path, rows, protocol):
    """Writes every figure, a line for each row, and how it was measured; null for what is infinite or not a number."""
    text = json.dumps(rows, default=torch.Tensor.tolist)
    rows = json.loads(text, parse_constant=lambda name: None)  # JSON has no Infinity and NaN
    results = ",\n".join(map(json.dumps, rows))
    data.replace(path, f'{{"protocol": {json.dumps(protocol)},\n"results": [\n{results}\n]}}\n'.encode())


def read_json(paths):
    """The rows of files that save_json wrote, and their protocol. ValueError where it is not the same in all."""
    rows, protocols = [], []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            protocols.append(content["protocol"])
            for row in content["results"]:
                row = {name: math.nan if value is None else value for name, value in row.items()}
                if "length" in row:
                    length = [math.inf if value is None else value for value in row["length"]]
                    row["length"] = torch.tensor(length, dtype=torch.float32, device="cpu")
                report([[row]], protocols[-1]["attacks"], protocols[-1]["caption"])  # whether all of it is there
                rows.append(row)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no whole file of --json ({reason(error)})") from None
        if protocols[-1] != protocols[0]:
            raise ValueError(f"{path}: its images or attacks are not those of {paths[0]}")
    return rows, protocols[0]


# --- Figures 2 and 4, and accuracy against perturbation -----------------------------------------------------------

def tile(images, columns):
    """Images (M,1,H,W) in [0,1], in rows of so many columns, twice as large, as one page (H',W')."""
    page = torch.vstack([torch.hstack(tuple(row)) for row in images[:, 0].cpu().split(columns)])
    return page.repeat_interleave(2, 0).repeat_interleave(2, 1)


def save_png(path, page):
    """Writes a page (H,W) of floats, clamped to [0,1], as 8-bit greyscale PNG."""
    ok = isinstance(page, torch.Tensor) and page.dim() == 2 and page.is_floating_point()
    expect(ok, "page", page, "floats (H,W) in [0,1]")

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    lines = F.pad((255 * page.clamp(0, 1)).round().byte(), (1, 0))  # each line begins with its filter, 0: none
    header = struct.pack(">IIBBBBB", page.shape[1], page.shape[0], 8, 0, 0, 0, 0)
    data.replace(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                 + chunk(b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)) + chunk(b"IEND", b""))


def figure_2(f, x, y, x_train, y_train):
    """A page of ten rows, the original classes, and ten columns, the targets: off the diagonal the attack to C = 0.95,
    dimmed where it did not reach C, on it the clean image in a white frame. And how many of the 90 attacks reached C,
    and how many of the 90 look like their target to the nearest training images."""
    digits = torch.arange(10, device=x.device)
    original, target = digits.repeat_interleave(10), digits.repeat(10)
    off = original != target
    first = (y == digits[:, None]).int().argmax(1)  # the first image of each class
    grid = x[first][original]
    grid[off] = high_confidence_attack(f, grid[off], target[off], 0.95)
    confidence = pick(batched_logits(f, grid).softmax(1), target)
    short = off & (confidence < 0.95 - 1e-6)
    alike = vote(grid, x_train, y_train) == target
    grid[short] *= 0.35
    framed = F.pad(grid, (2, 2, 2, 2))
    framed[~off] = F.pad(grid[~off], (2, 2, 2, 2), value=1)
    return tile(framed, 10), (off & ~short).sum().item(), (off & alike).sum().item()


def figure_4(f, x, y):
    """Rows a, b and c: what each shows, eight images, f's mean confidence in them in percent, how many fool f."""
    x, y = x[:8], y[:8]
    rows = {"clean": x, "at the boundary by DDN (the paper: Carlini-Wagner)": ddn(f, x, y),
            "the paper's attack": paper_attack(f, x, y)}
    return [(shows, row, 100 * batched_logits(f, row).softmax(1).amax(1).mean().item(), fooled(f, row, y).sum().item())
            for shows, row in rows.items()]


def draw(folder, rows, networks, x, y, x_train, y_train):
    """Draws Figures 2 and 4 of each network into the folder, prints what they show, keeps Figure 2's counts in rows."""
    right = torch.stack([classify(f, x, y) == y for f in networks]).all(0)
    some = right.int().argsort(descending=True, stable=True)  # first the images that all of them get right
    x, y = x[some], y[some]
    for row, f in zip(rows, networks):
        name = Path(row["checkpoint"]).stem
        path = folder / f"figure2-{name}.png"
        page, reached, alike = figure_2(f, x, y, x_train, y_train)
        save_png(path, page)
        row["figure 2"] = {"reach 95%": reached, "look like target": alike}
        print(f"{path}: {reached} of 90 attacks (the paper's; it drew Carlini-Wagner's) reach 95%, the others are "
              f"dimmed; {alike} of 90 look like their target")
        for letter, (shows, images, confidence, count) in zip("abc", figure_4(f, x, y)):
            path = folder / f"figure4-{name}-{letter}.png"
            save_png(path, tile(images, 8))
            print(f"{path}: {shows}, mean confidence {confidence:.0f}%, {count} of {len(images)} fool the network")


def save_svg(path, title, groups):
    """Writes accuracy against the l2 length of the smallest perturbations, 0 to 2.5, as SVG: a curve for each group of
    rows, labelled at its end, the critic's the thickest."""
    def text(x, y, words, anchor="middle", colour="black"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{html.escape(words)}</text>'

    def line(points, colour, width):
        points = " ".join(f"{x:.0f},{y:.1f}" for x, y in points)
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 440" font-family="sans-serif" font-size="20">',
             '<rect width="640" height="440" fill="white"/>', text(10, 26, title, "start"),
             text(270, 432, "l2 length of the perturbation")]
    parts += [text(70 + 80 * i, 400, f"{i / 2}") for i in range(6)]
    for percent in (0, 25, 50, 75, 100):
        y = 375 - 3.2 * percent
        parts += [line([(70, y), (470, y)], "#ddd", 1), text(60, y + 7, f"{percent}%", "end")]
    colours = dict(reference="black", at="#56b4e9", vat="#009e73", margin="#e69f00", pgd="#cc79a7", critic="#d55e00")
    labels = []
    defenses = [group[0]["settings"]["defense"] for group in groups]
    for group, defense in zip(groups, defenses):
        length = torch.cat([row["length"] for row in group])
        points = [(70 + 8 * i, 375 - 320 * share(length > i / 20)) for i in range(51)]
        colour = colours.get(defense, "grey")
        parts.append(line(points, colour, 6 if defense == "critic" else 2.5))
        labels.append((points[-1][1], defense if defenses.count(defense) == 1 else group[0]["name"], colour))
    bottom = math.inf
    for y, name, colour in sorted(labels, reverse=True):  # from below, at least 22 apart
        bottom = min(y + 7, bottom - 22)
        parts.append(text(478, bottom, name, "start", colour))
    data.replace(path, "\n".join([*parts, "</svg>\n"]).encode("utf-8", errors="replace"))


# --- Command line -------------------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: kind (int or float), finite and between low and high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def add_data_flags(parser, default):
    """--data, --data-dir and --device, as train.py has them too."""
    parser.add_argument("--data", choices=DATA, default=default, help="MNIST, or drawn digits that need no download "
                        f"(default {default or 'what the checkpoints were trained on'})")
    parser.add_argument("--data-dir", metavar="DIR", help="where MNIST's files are (default: $MNIST_DIR, else data)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: CUDA where there is one")


def parse_flags(argv):
    """The command line as argparse has it, with the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description="Attacks trained classifiers and prints Tables 1 and 2.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files that train.py wrote, or patterns "
                        "such as 'runs/*.pt'; or files of --json, for the tables of their rows")
    parser.add_argument("--n", type=number(int, 1, 10000), help="attack the first N of a fixed permutation of the test "
                        "images (default: all on CUDA, 500 on a CPU); the test error is always over all 10,000")
    parser.add_argument("--attacks", metavar="NAME,...", help="deepfool: to the closest boundary, step by step; cw: "
                        "Carlini and Wagner's l2 attack; paper: the paper's own, to the clean image's confidence; ddn: "
                        "decoupled direction and norm (default: all, on a CPU without cw, which takes long)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw Figures 2 and 4 of each network, and "
                        "the accuracy by length of the perturbation, into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write every number, and how it was "
                        "measured, to this file")
    add_data_flags(parser, default=None)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.n = args.n or (10000 if cuda else 500)
    default = ",".join(name for name in ATTACKS if cuda or name != "cw")
    args.attacks = list(dict.fromkeys((args.attacks or default).split(",")))  # each of them once
    unknown = {*args.attacks} - {*ATTACKS}
    if unknown:
        parser.error(f"--attacks: unknown {', '.join(sorted(unknown))}: choose from {','.join(ATTACKS)}")
    if args.json and (args.json.suffix != ".json" or args.json.is_dir()):
        parser.error(f"--json: {args.json}, expected a file whose name ends in .json")
    # what is no file is a pattern, where the shell has not put the files in its place
    expanded = [[text] if os.path.exists(text) else sorted(glob.glob(text)) or [text] for text in args.checkpoints]
    args.checkpoints = [Path(name) for names in expanded for name in names]
    return args


def set_up():
    """For both scripts: torch's own defaults, float32 also in a GPU's convolutions, a screen that takes any letter."""
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.allow_tf32 = False
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def evaluate_all(args):
    """Attacks all checkpoints, prints the tables, and writes what --json and --figures ask for. OSError, ValueError."""
    networks, settings = zip(*[load_checkpoint(path, args.device) for path in args.checkpoints])
    if args.figures and len({path.stem for path in args.checkpoints}) < len(networks):
        raise ValueError("--figures: the pictures of two checkpoints of one name would overwrite each other")
    trained_on = {info["data"] for info in settings}
    if not args.data and len(trained_on) > 1:
        raise ValueError(f"the checkpoints were trained on {' and '.join(sorted(trained_on))}: name one with --data")
    source = args.data or trained_on.pop()
    if source == "mnist":
        sets = data.load_mnist(args.data_dir)
    else:
        sets = (*data.drawn_digits(20000, seed=0), *data.drawn_digits(10000, seed=1))
    x_train, y_train, x, y = (part.to(args.device) for part in sets)
    x_train, y_train = x_train[10000:], y_train[10000:]  # without those held out for validation
    order = torch.randperm(10000, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(args.device)
    some = order[:args.n]
    protocol = {"caption": f"{args.n} {source} test images", "images": "the first of torch.randperm(10000), seed 0",
                "attacks": {name: ATTACKS[name].__doc__ for name in args.attacks}}
    rows, done = [], []
    for path, info in zip(args.checkpoints, settings):
        name = str(path.with_suffix("")).removesuffix(f"-{info['seed']}")
        published = PUBLISHED.get(f"{info['arch']} {info['defense']}", ()) if source == "mnist" else ()
        rows.append({"name": f"{name}, {info['epochs']} epochs", "checkpoint": str(path), "settings": info,
                     "published": dict(zip(PUBLISHED_COLUMNS, published)), "device": args.device,
                     "torch": torch.__version__})
    grouped(rows)  # refuses those that are given twice
    try:
        for row, f in zip(rows, networks):
            row["test error %"] = 100 * error_rate(f, x, y)
            title = f"[{len(done) + 1}/{len(rows)}] {row['checkpoint']}"
            row.update(evaluate(f, x[some], y[some], args.attacks, x_train, y_train, title))
            done.append(row)
            if args.json:  # after each network, so that no interruption loses more than one
                save_json(args.json, done, protocol)
    finally:
        if done:
            show(args, done, protocol)
    if args.figures:
        draw(args.figures, rows, networks, x[order[:500]], y[order[:500]], x_train, y_train)
        if args.json:
            save_json(args.json, rows, protocol)


def show(args, rows, protocol):
    """Prints the tables of these rows, and draws their curves where --figures asks for them."""
    groups = grouped(rows)
    print("\n".join(report(groups, protocol["attacks"], protocol["caption"])), flush=True)
    for arch in NETWORKS:
        mine = [group for group in groups if group[0]["settings"]["arch"] == arch and "length" in group[0]]
        if args.figures and mine:
            path = args.figures / f"accuracy-{arch}.svg"
            save_svg(path, f"{arch}: accuracy under attack, {protocol['caption']}", mine)
            print(path)


def main(argv=None):
    """The command line; returns the exit status."""
    args = parse_flags(argv)
    set_up()
    try:
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
        folders = [args.figures, args.json and Path(os.path.realpath(args.json)).parent]
        for folder in filter(None, folders):  # what cannot be written is known now, and not after the last attack
            data.replace(folder / ".eval", bytes(100_000))
            (folder / ".eval").unlink(missing_ok=True)
        if all(path.suffix == ".json" for path in args.checkpoints):
            rows, protocol = read_json(args.checkpoints)
            show(args, rows, protocol)  # refuses a row that is there twice
            if args.json:
                save_json(args.json, rows, protocol)
        else:
            evaluate_all(args)
    except (OSError, ValueError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
