"""How robust is a trained classifier? The paper's attacks and DDN; the paper's Tables 1 and 2, Figures 2 and 4.

    python eval.py results/*.pt --n 100             four networks in two and a half minutes on two CPU cores
    python eval.py runs/*.pt --n 100 --attacks deepfool,cw,paper,ddn --figures pictures --json all.json

Prints the tables, the published values in brackets: a line for each defense and network, with mean±standard deviation
over checkpoints that differ only in the seed. The attacks are functions of any classifier f, images x and labels y.
"""
import argparse
import functools
import glob
import html
import inspect
import json
import math
import os
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
from advcritic import (as_confidence, attack_step, boundaries, boundary_distance, checked, closest_class, lenet, mlp,
                       per_image)

NETWORKS = {"lenet": lenet, "mlp": mlp}
DATA = ("mnist", "strokes")


# --- Eq. 8: rho ---------------------------------------------------------------------------------------------------

def wide(x):
    """x in float32 at least, so that sums over half precision are right."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2(v):
    """|v|_2 of each image: v (N,...) -> (N,)."""
    return wide(v).flatten(1).norm(dim=1)


def rho(x, x_adv):
    """|x_adv - x|_2 / |x|_2 of each image (Eq. 8 before the mean): (N,), nan where x is black (norm 0)."""
    if x_adv.shape != x.shape or x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, x_adv: {tuple(x_adv.shape)}, expected both (N,...)")
    norm = l2(x)
    return torch.where(norm > 0, l2(wide(x_adv) - wide(x)) / norm, torch.nan)


# --- What holds for every attack ----------------------------------------------------------------------------------

@torch.no_grad()
def batched_logits(f, x):
    """f(x) (N,K), computed in parts that fit into memory."""
    return torch.cat([checked(f(part.clone()), part) for part in x.split(500)])  # clone: for an f that works in place


def check_images(x):
    """ValueError unless x holds floating-point images (N,...) in [0,1]."""
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x: {x.dtype} of shape {tuple(x.shape)}, expected floating-point images (N,...) in [0,1]")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"x: values from {x.min().item():.7g} to {x.max().item():.7g}, expected images in [0,1]")


def check_labels(name, y, n, num_classes):
    """ValueError unless y holds n integers in [0, num_classes)."""
    if y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"{name}: {y.dtype} of shape {tuple(y.shape)}, expected integers of shape ({n},)")
    if n and not 0 <= y.min() <= y.max() < num_classes:
        raise ValueError(f"{name}: values from {y.min()} to {y.max()}, expected classes 0 to {num_classes - 1}")


def image_attack(method):
    """Decorates an attack method(f, x, y, ...), or a targeted one, method(f, x, target, ...), with what holds for all:

    - f is any callable, images -> logits (N,K), that treats each image by itself (eval mode for batch norm and
      dropout); x (N,...) floating-point images in [0,1], y integers (N,). ValueError otherwise, also where a logit
      at x is not finite (targeted: -inf is allowed, a class that cannot be reached). An empty batch gives an empty one.
    - nothing is changed: x, f's mode, weights and their gradients; it works in no_grad and inference mode.
    - the attack computes in float32 at least. f gets images in x's type, and success is judged on those.
    - x_adv (N,...) in [0,1], of x's type, detached. An image that is not y to begin with, or that the attack did not
      turn into another class, comes back as x; targeted, only one that is not finite.
    """
    signature = inspect.signature(method)
    name = list(signature.parameters)[2]
    targeted = name == "target"

    @functools.wraps(method)
    def attack(*args, **kwargs):
        options = signature.bind(*args, **kwargs).arguments
        f, x, y = options.pop("f"), options.pop("x"), options.pop(name)
        with torch.inference_mode(False), torch.no_grad():
            check_images(x)
            x, y = x.clone(), y.clone()  # outside inference mode, so that autograd may keep them
            if len(x) == 0:
                return x

            def g(some):  # f on images in x's type, for an attack that computes in float32 at least
                return checked(f(some.to(x.dtype, copy=True)), some).to(some.dtype)
            x_adv = wide(x).clone()
            with torch.enable_grad():
                f_x = g(x_adv.clone().requires_grad_())
            if not f_x.requires_grad:
                raise ValueError("f: its logits have no gradient, expected f without no_grad and detach")
            f_x = f_x.detach()
            check_labels(name, y, *f_x.shape)
            if not (f_x < torch.inf if targeted else f_x.isfinite()).all():
                raise ValueError("f: its logits at x are not finite")
            y = y.long()
            start = torch.ones_like(y, dtype=torch.bool) if targeted else f_x.argmax(1) == y
            if start.any():
                x_adv[start] = method(g, x_adv[start], y[start], **options)
            x_adv = x_adv.clamp(0, 1).to(x.dtype)
            done = x_adv.isfinite().flatten(1).all(1) if targeted else fooled(f, x_adv, y)
            return torch.where(per_image(done, x), x_adv, x)
    return attack


def classify(f, x, y):
    """The class (N,) that f gives to each image; -1, no class, where its largest logit is infinite or not a number.
    y is only checked: ValueError unless it holds N labels that f knows."""
    f_x = batched_logits(f, x)
    check_labels("y", y, *f_x.shape)
    largest, label = f_x.max(1)
    return torch.where(largest.isfinite(), label, -1)


def fooled(f, x_adv, y):
    """True (N,) where f classifies x_adv, with a finite logit, as another class than y."""
    label = classify(f, x_adv, y)
    return (label != y) & (label >= 0)


def unit(v):
    """v (N,...) divided by its l2 length, image by image."""
    return v / per_image(l2(v).clamp(min=1e-12), v)


def own_and_others(f_x, y):
    """Of logits f_x (N,K): f_y (N,), and all of them with -inf in its place, for a maximum over the other classes."""
    return f_x.gather(1, y[:, None]).squeeze(1), f_x.scatter(1, y[:, None], -torch.inf)


# --- The attacks --------------------------------------------------------------------------------------------------

@image_attack
def deepfool(f, x, y, steps=500, max_step=0.1, overshoot=0.02):
    """l2 DeepFool (Moosavi-Dezfooli, Fawzi and Frossard 2016), to the closest boundary, the class chosen anew at
    each step:

    r += (min(|f_k - f_y| / |w|, max_step) + 1e-4) w / |w|,   w = grad f_k - grad f_y,   all at x + r

    until x_adv = clamp(x + (1 + overshoot) r) is not classified as y; r is taken back from the clamped image. The
    1e-4 makes the step cross the boundary on which it would end. max_step=0.1 is the paper's, None takes full steps.
    Arguments, errors and x_adv as image_attack says; steps is the most that are taken.
    """
    x_adv, r, live = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        if len(live) == 0:
            break
        gap, norm, w = boundaries(f, (x + r)[live], y[live])
        length = boundary_distance(gap, norm).scatter(1, y[live, None], torch.inf).amin(1)
        if max_step is not None:
            length = length.clamp(max=max_step)
        r_i = per_image(length + 1e-4, w) * unit(w)
        x_i = (x[live] + (1 + overshoot) * (r[live] + r_i)).clamp(0, 1)
        x_adv[live] = x_i
        r[live] = (x_i - x[live]) / (1 + overshoot)
        live = live[f(x_i).argmax(1) == y[live]]
    return x_adv


@image_attack
def carlini_wagner(f, x, y, steps=1000, search_steps=9, lr=0.01):
    """The untargeted l2 attack of Carlini and Wagner (2017). Adam on w, with x_adv = (tanh w + 1) / 2, minimises

    |x_adv - x|_2^2 + c max(0, f_y - max_{k != y} f_k)

    from w = atanh(0.999999 (2x - 1)): without the factor a pixel of 0 or 1 has no gradient. c begins at 1e-3; after
    each of the search steps it is bisected, or multiplied by 10 as long as no c has fooled f. An image leaves a
    search step once a fortieth of the steps has not lowered its own best loss by 0.1%; in the first half only if this
    loss has fallen before: a pixel of 0 or 1 needs hundreds of steps to come out of where tanh is flat.
    Arguments, errors and x_adv as image_attack says; x_adv is the closest image that fooled f.
    """
    x_adv, shortest = x.clone(), x.new_full((len(x),), torch.inf)  # shortest: |x_adv - x|^2
    low, c, high = (x.new_full((len(x),), value) for value in (0, 1e-3, torch.inf))
    for _ in range(search_steps):
        live, found = torch.arange(len(x), device=x.device), torch.zeros_like(y, dtype=torch.bool)
        w = (0.999999 * (2 * x - 1)).atanh()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        best = last = torch.full_like(c, torch.inf)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                w.requires_grad_()
                x_i = (w.tanh() + 1) / 2
                f_y, others = own_and_others(f(x_i), y[live])
                gap = f_y - others.amax(1)
                square = (x_i - x[live]).flatten(1).square().sum(1)
                loss = square + c[live] * gap.clamp(min=0)
                grad, = torch.autograd.grad(loss.sum(), w)
            found[live] |= gap < 0
            closer = (gap < 0) & (square < shortest[live])
            x_adv[live] = torch.where(per_image(closer, x), x_i, x_adv[live])
            shortest[live] = torch.where(closer, square, shortest[live])
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()  # Adam
            w = w.detach() - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
            best = torch.minimum(best, loss)
            if step == 1:
                first = loss
            if step % max(1, steps // 40) == 0:
                falling = best < 0.999 * last
                not_begun = (best > 0.995 * first) & (step < steps / 2)
                going = falling | not_begun
                live, w, m, v, first, best = (part[going] for part in (live, w, m, v, first, best))
                last = best
                if len(live) == 0:
                    break
        low, high = torch.where(found, low, c), torch.where(found, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return x_adv


@image_attack
def ddn(f, x, y, steps=1000):
    """The l2 attack by decoupled direction and norm (Rony et al. 2019). From r = 0 and length 1, in each step:

    r += alpha g / |g|,   g = grad NLL(f(x + r), y),   alpha from 1 to 0.01 along a cosine
    length *= 0.95 if f(x + r) was not y, else 1.05;   r is set to this length, then x + r clamped to [0,1].
    Arguments, errors and x_adv as image_attack says; x_adv is the closest image that fooled f.
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
    return x_adv.detach()


@image_attack
def high_confidence_attack(f, x, target, confidence, steps=500, max_step=0.1, overshoot=0.02):
    """The paper's attack as its tests use it (Section 5): Eq. 7 in small steps, each projected to [0,1], until f
    classifies x_adv as the target with a probability of at least confidence.

    x_adv <- clamp(x_adv + (1 + overshoot) r_i),   r_i by Eq. 7 at x_adv (attack_step), cut to |r_i|_2 <= max_step

    target integers (N,); confidence in (0,1], a float or (N,); max_step None takes full steps; steps is the most that
    are taken. An attack that fails keeps its last iterate. Other arguments, errors and x_adv as image_attack says.
    """
    C = as_confidence(confidence, x)
    if not ((C > 0) & (C <= 1)).all():
        raise ValueError(f"confidence: values from {C.min():.7g} to {C.max():.7g}, expected probabilities in (0,1]")
    x_adv, live = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        r_i, p, logits = attack_step(f, x_adv[live], target[live], C[live])
        going = (p < C[live]) | (logits.argmax(1) != target[live])
        live, r_i = live[going], r_i[going]
        if len(live) == 0:
            break
        if max_step is not None:
            r_i = per_image(l2(r_i).clamp(max=max_step), r_i) * unit(r_i)
        x_adv[live] = (x_adv[live] + (1 + overshoot) * r_i).clamp(0, 1)
    return x_adv


@image_attack
def paper_attack(f, x, y):
    """The paper's attack in its test protocol (Section 5): high_confidence_attack to the class that is closest at x,
    and to the confidence that f has at x.

    Arguments and errors as image_attack says. Returns x_adv also where it is the target but short of the confidence,
    and x where it is not the target.
    """
    target = closest_class(f, x, y)
    x_adv = high_confidence_attack(f, x, target, f(x).softmax(1).amax(1))
    return torch.where(per_image(f(x_adv).argmax(1) == target, x), x_adv, x)


ATTACKS = {"deepfool": deepfool, "cw": carlini_wagner, "paper": paper_attack, "ddn": ddn}


# --- Measuring a classifier ---------------------------------------------------------------------------------------

def percent(which):
    """The share of True, in percent."""
    return 100 * which.double().mean().item()


def error_rate(f, x, y):
    """The share of the images x (N,...) that f does not classify as y (N,), a float in [0,1]."""
    return (classify(f, x, y) != y).double().mean().item()


def mean_rho(x, length):
    """Eq. 8 from the lengths (N,) of the perturbations, without infinite ones and without black images."""
    ratio = length / l2(x)
    return ratio[ratio.isfinite()].mean().item()


def measure(f, x, y, method, title=None):
    """Attacks the images x with method(f, x, y); with a title it shows its progress on a terminal. A dict:

    x_adv    (N,...) what method returned; all that follows is found from it alone
    length   (N,) |x_adv - x|_2; 0 where f is wrong by itself, infinite where x_adv is still classified as y
    rho      Eq. 8, without the images that were not fooled; failed: their number; seconds: wall-clock time
    """
    check_images(x)
    right = classify(f, x, y) == y
    start, parts = time.perf_counter(), []
    show = title is not None and sys.stderr.isatty()
    for some in torch.arange(len(x), device=x.device).split(2000 if x.is_cuda else 50):
        if show:
            done, seconds = some[0].item(), time.perf_counter() - start
            left = f", {seconds * (len(x) / done - 1):.0f} s left" if done else ""
            print(f"\r{title}: {done} of {len(x)} images{left}\033[K", end="", file=sys.stderr, flush=True)
        parts.append(method(f, x[some], y[some]))
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    x_adv = torch.cat(parts).detach()
    if x_adv.shape != x.shape:
        raise ValueError(f"method: returned shape {tuple(x_adv.shape)}, expected that of x, {tuple(x.shape)}")
    length = l2(wide(x_adv) - wide(x.detach()))
    done = fooled(f, x_adv, y) & length.isfinite()
    length = torch.where(right, length, 0).masked_fill(~done, torch.inf)
    return dict(x_adv=x_adv, length=length, rho=mean_rho(x, length), failed=(~done).sum().item(),
                seconds=time.perf_counter() - start)


def vote(x, x_train, y_train, k=5):
    """The class (N,) of images x by the vote of their k nearest training images in l2; ties go to the nearest."""
    weight = 1 + 0.1 * 0.5 ** torch.arange(k, device=x.device)  # 1.1, 1.05, ...: a tie goes to the nearer
    nearest = torch.cat([torch.cdist(part.flatten(1), x_train.flatten(1)).topk(k, largest=False).indices
                         for part in x.split(250)])
    return (F.one_hot(y_train[nearest], int(y_train.max()) + 1) * weight[:, None]).sum(1).argmax(1)


LENGTHS = (1.0, 1.25, 1.5)  # in l2, at which the accuracy is reported


def evaluate(f, x, y, attacks, x_train, y_train, title):
    """What the tables say of f on the images x, y under the named attacks: a dict of figures by the tables' headings.
    "worst" is rho of each image's smallest perturbation by all attacks but the paper's, and "length" (N,) are the
    lengths of these, infinite where all failed."""
    runs = {name: measure(f, x, y, ATTACKS[name], f"{title} {name}") for name in attacks}
    row = {name: run["rho"] for name, run in runs.items()}
    row["failed"] = [run["failed"] for run in runs.values()]
    row["seconds"] = [run["seconds"] for run in runs.values()]
    smallest = [run["length"] for name, run in runs.items() if name != "paper"]
    if smallest:
        worst = torch.stack(smallest).amin(0)
        row["length"], row["worst"] = worst, mean_rho(x, worst)
        row["all failed"] = worst.isinf().sum().item()
        for length in LENGTHS:
            row[f"at {length} %"] = percent(worst > length)
        if "ddn" in runs and len(smallest) > 1:
            found = runs["ddn"]["length"].isfinite()
            alone = mean_rho(x[found], runs["ddn"]["length"][found])
            row["shorter than ddn %"] = 100 * (1 - mean_rho(x[found], worst[found]) / alone) if alone > 0 else math.nan
    if "paper" in runs:
        row.update(compare_with_neighbours(f, x, y, runs["paper"], x_train, y_train))
    return row


def compare_with_neighbours(f, x, y, run, x_train, y_train):
    """Table 2 by a vote of the nearest training images, on the images that f gets right and the paper's attack moved
    to its target; and two controls of this vote: the clean images, and random noise of the same length."""
    moved = (classify(f, x, y) == y) & run["length"].isfinite()
    x, x_adv, y = x[moved], run["x_adv"][moved], y[moved]
    before, after = (batched_logits(f, images).softmax(1).max(1) for images in (x, x_adv))
    noise = unit(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)) * per_image(l2(x_adv - x), x)
    voted, clean, noisy = (vote(images, x_train, y_train) for images in (x_adv, x, x + noise))
    return {"looks like target %": percent(voted == after.indices), "looks like original %": percent(voted == y),
            "clean error %": percent(clean != y), "noise: original %": percent(noisy == y), "images": [len(y)],
            "reached %": percent(after.values >= before.values - 1e-6)}


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
    f = NETWORKS[arch]()
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
        NETWORKS[settings["arch"]]().load_state_dict(checkpoint["f"])
        finite = all(part.isfinite().all() for part in checkpoint["f"].values())
        if damaged or settings["data"] not in DATA or not finite:
            raise ValueError("it is damaged, its data unknown or a weight not finite")
        return checkpoint
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything, from the unpickler to load_state_dict
        reason = f"{type(error).__name__}: {str(error).strip()[:120]}".split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint of train.py, or a broken one ({reason})") from None


def load_checkpoint(path, device="cpu"):
    """The classifier of a checkpoint of train.py, full or weights-only, and its settings: f (in eval mode), dict, its
    "epochs" such as "3 of 100" where the run did not come to its end. Errors as read_checkpoint has them."""
    checkpoint = read_checkpoint(path)
    f = network(checkpoint["settings"]["arch"], device)
    f.load_state_dict(checkpoint["f"])
    info, log = dict(checkpoint["settings"]), checkpoint.get("log")
    if log and log[-1]["epoch"] < info["epochs"]:
        info["epochs"] = f"{log[-1]['epoch']} of {info['epochs']}"
    return f.eval(), info


# --- Tables 1 and 2 -----------------------------------------------------------------------------------------------

PUBLISHED_COLUMNS = ("test error %", "deepfool", "cw", "paper", "looks like target %", "looks like original %")
PUBLISHED = {  # the paper's values, in this order
    "mlp reference": (1.46, .131, .124, .173, 0.57, 98.74), "lenet reference": (0.64, .157, .148, .207, 2.54, 96.53),
    "mlp at": (0.90, .228, .210, .299, 19.02, 77.21), "lenet at": (0.55, .215, .191, .286, 19.1, 75.94),
    "mlp vat": (0.84, .244, .215, .355, 35.08, 59.68), "lenet vat": (0.60, .225, .195, .330, 26.8, 67.73),
    "mlp margin": (0.84, .262, .230, .453, 60.47, 34.52), "lenet margin": (0.54, .248, .225, .470, 81.77, 13.15),
    "mlp critic": (1.18, .290, .272, .575, 87.99, 9.86), "lenet critic": (0.93, .288, .278, .590, 92.29, 6.51)}


def table(groups, names):
    """Lines of text, one for each group of rows: its name and seeds, and the figures of these names, the published
    ones in brackets."""
    published = {name for group in groups for name in group[0]["published"]}
    cells = [["", "seeds", *(f"{name} (published)" if name in published else name for name in names)]]
    for group in groups:
        cells.append([group[0]["name"], str(len(group))])
        for name in names:
            values = torch.tensor([row[name] for row in group], dtype=torch.float64)
            digits = 2 if "error" in name else 1 if "%" in name else 3
            cell = f"{values.mean():.{digits}f}"
            if values.dim() == 2:  # a list, such as a number for each attack: its sums over all seeds
                cell = "/".join(f"{value:.0f}" for value in values.sum(0))
            elif len(group) > 1:
                cell += f"±{values.std():.{digits}f}"
            if name in group[0]["published"]:
                cell += f" ({group[0]['published'][name]:.{digits}f})"
            cells[-1].append(cell)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for name, *others in cells]


def report(groups, attacks, caption):
    """Lines of text: Table 1, Table 2, and for each checkpoint what DDN alone would have said, as far as the attacks
    allow."""
    smallest = ", ".join(name for name in attacks if name != "paper")
    columns = ["worst", *(f"at {length} %" for length in LENGTHS)] if smallest else []
    lines = [f"Table 1: test error, and rho on {caption}",
             *table(groups, ["test error %", *columns, *attacks, "failed", "seconds"]),
             "rho: mean |x_adv - x| / |x|, 0 where f is wrong by itself, without the images that were not fooled",
             f"failed (were not fooled) and seconds, by attack, summed over seeds: {'/'.join(attacks)}"]
    if smallest:
        lines.append(f"worst: the smallest perturbation of each image by {smallest}; at 1.5: the accuracy left under "
                     "those of up to length 1.5")
    if "paper" in attacks:
        columns = ["looks like target %", "looks like original %", "clean error %", "noise: original %", "images",
                   "reached %"]
        lines += ["", f"Table 2: {caption} under the paper's attack; the 5 nearest training images vote for people",
                  *table(groups, columns), "clean error: of this vote on clean images; noise: on random noise of the "
                  "attack's length; reached: within 1e-6 of the clean confidence"]
    rows = [row for group in groups for row in group if "shorter than ddn %" in row]
    if rows:
        lines += ["", f"Masked gradients? {caption}, how much shorter than DDN's alone the smallest perturbations are:"]
    for row in rows:
        shorter = row["shorter than ddn %"]
        line = f"{row['checkpoint']}: {shorter:.1f}%; every attack fails on {row['all failed']} images"
        lines.append(line + "; DDN alone overstates this network" if shorter > 5 else line)
    return lines


def save_json(path, rows, protocol):
    """Writes every figure, a line for each row, and how it was measured; null for what is infinite or not a number."""
    lines = []
    for row in rows:
        text = json.dumps(row, default=torch.Tensor.tolist)
        finite = json.loads(text, parse_constant=lambda name: None)  # Infinity and NaN, which JSON does not have
        lines.append(json.dumps(finite))
    results = ",\n".join(lines)
    data.replace(path, f'{{"protocol": {json.dumps(protocol)},\n"results": [\n{results}\n]}}\n'.encode())


# --- Figures 2 and 4, and accuracy against perturbation -----------------------------------------------------------

def tile(images, columns):
    """Images (M,1,H,W) in [0,1], in rows of so many columns, twice as large, as one page (H',W')."""
    height, width = images.shape[2:]
    page = images.reshape(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width).cpu()
    return page.repeat_interleave(2, 0).repeat_interleave(2, 1)


def save_png(path, page):
    """Writes a page (H,W) of floats, clamped to [0,1], as 8-bit greyscale PNG."""
    if page.dim() != 2 or not page.is_floating_point():
        raise ValueError(f"page: {page.dtype} of shape {tuple(page.shape)}, expected floats (H,W) in [0,1]")

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    lines = F.pad((255 * page.clamp(0, 1)).round().byte(), (1, 0))  # each line begins with its filter, 0: none
    header = struct.pack(">IIBBBBB", page.shape[1], page.shape[0], 8, 0, 0, 0, 0)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
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
    confidence = batched_logits(f, grid).softmax(1).gather(1, target[:, None]).squeeze(1)
    short = off & (confidence < 0.95 - 1e-6)
    alike = vote(grid, x_train, y_train) == target
    grid[short] *= 0.35
    framed = F.pad(grid, (2, 2, 2, 2))
    framed[~off] = F.pad(grid[~off], (2, 2, 2, 2), value=1)
    return tile(framed, 10), (off & ~short).sum().item(), (off & alike).sum().item()


def figure_4(f, x, y):
    """Rows a, b and c by what they show: eight images each, and f's mean confidence in them in percent."""
    x, y = x[:8], y[:8]
    rows = {"clean": x, "at the boundary by DDN (the paper: Carlini-Wagner)": ddn(f, x, y),
            "the paper's attack": paper_attack(f, x, y)}
    return {shows: (row, 100 * batched_logits(f, row).softmax(1).amax(1).mean().item()) for shows, row in rows.items()}


COLOURS = dict(reference="black", at="#56b4e9", vat="#009e73", margin="#e69f00", pgd="#cc79a7", critic="#d55e00")


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
    for share in (0, 25, 50, 75, 100):
        parts += [line([(70, 375 - 3.2 * share), (470, 375 - 3.2 * share)], "#ddd", 1),
                  text(60, 382 - 3.2 * share, f"{share}%", "end")]
    labels = []
    defenses = [group[0]["settings"]["defense"] for group in groups]
    for group, defense in zip(groups, defenses):
        length = torch.cat([row["length"] for row in group])
        points = [(70 + 8 * i, 375 - 3.2 * percent(length > i / 20)) for i in range(51)]
        colour = COLOURS.get(defense, "grey")
        name = defense if defenses.count(defense) == 1 else group[0]["name"]
        parts.append(line(points, colour, 6 if defense == "critic" else 2.5))
        labels.append((points[-1][1], name, colour))
    bottom = math.inf
    for y, name, colour in sorted(labels, reverse=True):  # from below, at least 22 apart
        bottom = min(y + 7, bottom - 22)
        parts.append(text(478, bottom, name, "start", colour))
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def draw(folder, groups, networks, x, y, x_train, y_train, caption):
    """Draws Figures 2 and 4 of each network, and for each architecture the accuracy of all groups. Lines of text."""
    lines = []
    right = torch.stack([classify(f, x, y) == y for f in networks.values()]).all(0)
    some = right.int().argsort(descending=True, stable=True)  # first the images that all of them get right
    x, y = x[some], y[some]
    for name, f in networks.items():
        path = folder / f"figure2-{name}.png"
        page, reached, alike = figure_2(f, x, y, x_train, y_train)
        save_png(path, page)
        lines.append(f"{path}: {reached} of 90 attacks (the paper's; it drew Carlini-Wagner's) reach 95%, the others "
                     f"are dimmed; {alike} of 90 look like their target")
        for letter, (shows, (row, confidence)) in zip("abc", figure_4(f, x, y).items()):
            path = folder / f"figure4-{name}-{letter}.png"
            save_png(path, tile(row, 8))
            lines.append(f"{path}: {shows}, mean confidence {confidence:.0f}%")
    for arch in NETWORKS:
        mine = [group for group in groups if group[0]["settings"]["arch"] == arch and "length" in group[0]]
        if mine:
            path = folder / f"accuracy-{arch}.svg"
            save_svg(path, f"{arch}: accuracy under attack, {caption}", mine)
            lines.append(str(path))
    return lines


# --- Command line -------------------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: kind (int or float), finite and between low and high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def user_path(text):
    """An argparse type: a path, with ~ expanded, which not every shell does."""
    return Path(os.path.expanduser(text))


def add_data_flags(parser, default):
    """--data, --data-dir and --device, as train.py has them too."""
    parser.add_argument("--data", choices=DATA, default=default, help="MNIST, or drawn digits that need no download "
                        f"(default {default or 'what the checkpoints were trained on'})")
    parser.add_argument("--data-dir", type=user_path, metavar="DIR", help="the folder of MNIST's four files (default: "
                        "$MNIST_DIR, else data)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: CUDA where there is one")


def parse_flags(argv):
    """The command line as argparse has it, with the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description="Attacks trained classifiers and prints Tables 1 and 2.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", type=user_path, help="files that train.py "
                        "wrote, or patterns such as 'runs/*.pt'")
    parser.add_argument("--n", type=number(int, 1, 10000), help="attack the first N of a fixed permutation of the test "
                        "images (default: all on CUDA, 500 on a CPU); the test error is always over all 10,000")
    parser.add_argument("--attacks", metavar="NAME,...", help="deepfool: to the closest boundary, step by step; cw: "
                        "Carlini and Wagner's l2 attack; paper: the paper's own, to the clean image's confidence; ddn: "
                        "decoupled direction and norm (default: all, on a CPU without cw, which takes long)")
    parser.add_argument("--figures", type=user_path, metavar="DIR", help="draw Figures 2 and 4 of each network, and "
                        "the accuracy by length of the perturbation, into this folder")
    parser.add_argument("--json", type=user_path, metavar="FILE.json", help="write every number, and how it was "
                        "measured, to this file")
    add_data_flags(parser, default=None)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if args.attacks is None:
        args.attacks = [name for name in ATTACKS if cuda or name != "cw"]
    else:
        args.attacks = list(dict.fromkeys(args.attacks.split(",")))  # each of them once
    args.n = args.n or (10000 if cuda else 500)
    unknown = {*args.attacks} - {*ATTACKS}
    if unknown:
        parser.error(f"--attacks: unknown {', '.join(unknown)}: choose from {','.join(ATTACKS)}")
    if args.figures and args.figures.is_file():
        parser.error(f"--figures: {args.figures} is a file, expected a folder")
    if args.json and args.json.suffix != ".json":
        parser.error(f"--json: {args.json}, expected a name that ends in .json")
    files = []
    for path in args.checkpoints:  # or a pattern such as runs/*.pt, where the shell has not put the files in its place
        matches = [] if path.exists() else sorted(glob.glob(str(path)))
        files += [Path(name) for name in matches] or [path]
    args.checkpoints = files
    return args


def load_all(args):
    """The networks and settings of all checkpoints, the data's name and its four tensors. OSError, ValueError."""
    loaded = [load_checkpoint(path, args.device) for path in args.checkpoints]
    all_settings = [settings for _, settings in loaded]
    names = [path.stem for path in args.checkpoints]
    for path, settings in zip(args.checkpoints, all_settings):
        if all_settings.count(settings) > 1:
            raise ValueError(f"{path} is given twice, or another checkpoint has the same settings and seed")
        if args.figures and names.count(path.stem) > 1:
            raise ValueError(f"{path}: the pictures of two checkpoints of this name would overwrite each other")
    trained_on = {settings["data"] for settings in all_settings}
    if not args.data and len(trained_on) > 1:
        raise ValueError(f"the checkpoints were trained on {' and '.join(trained_on)}: name one with --data")
    source = args.data or trained_on.pop()
    if source == "mnist":
        sets = data.load_mnist(args.data_dir)
    else:
        sets = (*data.stroke_digits(20000, seed=0), *data.stroke_digits(10000, seed=1))
    if args.figures:  # whether both can be written is known now, not after the last attack
        args.figures.mkdir(parents=True, exist_ok=True)
    if args.json:
        args.json.open("a").close()
    return loaded, source, sets


def evaluate_all(args):
    """Attacks all checkpoints, prints the tables, and writes what --json and --figures ask for. OSError, ValueError."""
    loaded, source, sets = load_all(args)
    x_train, y_train, x, y = (part.to(args.device) for part in (sets[0][10000:], sets[1][10000:], *sets[2:]))
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).to(args.device)
    some, caption = order[:args.n], f"{args.n} {source} test images"
    protocol = {"images": f"first {args.n} of torch.randperm(10000), seed 0, of the test set of {source}",
                "attacks": {name: ATTACKS[name].__doc__ for name in args.attacks},
                "device": args.device, "torch": torch.__version__}
    groups, networks = {}, {}
    for i, (path, (f, settings)) in enumerate(zip(args.checkpoints, loaded), 1):
        row = {"name": f"{path.stem.removesuffix('-' + str(settings['seed']))}, {settings['epochs']} epochs",
               "checkpoint": str(path), "settings": settings, "published": {},
               "test error %": 100 * error_rate(f, x, y)}
        known = PUBLISHED.get(f"{settings['arch']} {settings['defense']}")
        if known and source == "mnist":
            row["published"] = dict(zip(PUBLISHED_COLUMNS, known))
        row.update(evaluate(f, x[some], y[some], args.attacks, x_train, y_train, f"[{i}/{len(loaded)}] {path}"))
        all_but_the_seed = frozenset({**settings, "seed": None}.items())
        groups.setdefault(all_but_the_seed, []).append(row)
        networks[path.stem] = f
        if args.json:  # after each network, so that no interruption loses more than one
            save_json(args.json, [row for group in groups.values() for row in group], protocol)
    groups = list(groups.values())
    print("\n".join(report(groups, args.attacks, caption)), flush=True)
    if args.figures:
        pages = draw(args.figures, groups, networks, x[order[:500]], y[order[:500]], x_train, y_train, caption)
        print("\n".join(pages))


def main(argv=None):
    """The command line; returns the exit status."""
    args = parse_flags(argv)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, also in a GPU's convolutions
    try:
        evaluate_all(args)
    except (OSError, ValueError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f" {args.json} keeps the networks that were finished." if args.json else ""
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no ±
    sys.exit(main())
