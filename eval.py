"""How robust is a trained classifier? The paper's attacks and DDN; tables and figures as in the paper.

    python eval.py runs/*.pt --n 1000 --attacks deepfool,cw,paper,ddn --figures pictures --json all.json

Prints the tables, with the paper's values in brackets. Checkpoints that differ only in the seed share a line. A network
takes 9 to 18 minutes for 1,000 images on one CPU core, and an hour more with Carlini and Wagner's attack (cw).
"""
import argparse
import glob
import io
import json
import math
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch does not need it

import torch
import torch.nn.functional as F
from torch import nn

import data
from advcritic import attack_step, boundaries, broadcast, closest_class, l2, lenet, mlp, pick

NETWORKS = {"lenet": lenet, "mlp": mlp}


# --- The attacks: f, images x (N,...) in [0,1] that f classifies as y (N,) -> x_adv (N,...) in [0,1], detached ----
# An attack leaves f, its mode and its gradients as they were. It does not promise that x_adv fools f: measure decides.

def unit(v):
    """v (N,...) divided by its l2 length, image by image; 0 stays 0."""
    return F.normalize(v.flatten(1)).view_as(v)


def gradient_towards(f, x, y, k):
    """f's logits (N,K) at x, and the gradient (N,...) of f_k - f_y at x: the direction from class y to class k."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = f(x)
        w, = torch.autograd.grad((pick(logits, k) - pick(logits, y)).sum(), x)
    return logits.detach(), w


@torch.no_grad()
def deepfool(f, x, y, steps=500, max_step=0.1, overshoot=0.02):
    """l2 DeepFool (Moosavi-Dezfooli, Fawzi and Frossard 2016): at most `steps` steps, each to the boundary that is
    closest then, of class k:

    r += (min(|f_k - f_y| / |w|, max_step) + 1e-4) w / |w|,   w = grad f_k - grad f_y,   all at x + r

    until x_adv = clamp(x + (1 + overshoot) r) is not classified as y. r is recomputed from the clamped image. Without
    1e-4, x + r would end exactly on a linear boundary. The paper cuts step lengths to 0.1; math.inf cuts none.
    """
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)  # active: the images that do not fool f yet
    for _ in range(steps):
        active = active[f(x_adv[active]).argmax(1) == y[active]]
        if len(active) == 0:
            break
        r = (x_adv[active] - x[active]) / (1 + overshoot)
        distance, k = boundaries(f, x[active] + r, y[active])[1].min(1)
        _, w = gradient_towards(f, x[active] + r, y[active], k)
        r = r + broadcast(distance.clamp(max=max_step) + 1e-4, x) * unit(w)
        x_adv[active] = (x[active] + (1 + overshoot) * r).clamp(0, 1)
    return x_adv


@torch.no_grad()
def carlini_wagner(f, x, y, steps=1000, search_steps=9, lr=0.01):
    """The untargeted l2 attack of Carlini and Wagner (2017). Adam on w, with x_i = (tanh w + 1) / 2, minimises

    |x_i - x|_2^2 + c max(0, f_y - max_{k != y} f_k)

    from w = atanh(0.999999 (2x - 1)); without the factor a pixel of 0 or 1 would have no gradient. The c of each image
    begins at 1e-3. Each search step multiplies it by 10 until f was fooled, and from then on bisects it. x_adv is the
    closest x_i that fooled f in any step. There is no early abort, unlike in Carlini and Wagner's code.
    """
    x_adv, shortest = x.clone(), x.new_full((len(x),), torch.inf)  # shortest: the smallest |x_adv - x|^2
    low, c, high = (x.new_full((len(x),), value) for value in (0, 1e-3, torch.inf))
    for _ in range(search_steps):
        w = (0.999999 * (2 * x - 1)).atanh().requires_grad_()
        adam = torch.optim.Adam([w], lr=lr)
        found = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(steps):
            with torch.enable_grad():
                x_i = (w.tanh() + 1) / 2
                logits = f(x_i)
                f_y, f_rival = pick(logits, y), logits.scatter(1, y[:, None], -torch.inf).amax(1)
                square = (x_i - x).flatten(1).square().sum(1)
                loss = square + c * (f_y - f_rival).clamp(min=0)
                w.grad, = torch.autograd.grad(loss.sum(), w)
            fooled = f_rival > f_y
            closer = fooled & (square < shortest)
            x_adv = torch.where(broadcast(closer, x), x_i, x_adv)
            shortest = torch.where(closer, square, shortest)
            found |= fooled
            adam.step()
        low = torch.where(found, low, c)
        high = torch.where(found, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return x_adv


@torch.no_grad()
def ddn(f, x, y, steps=100, classes=9):
    """The l2 attack by decoupled direction and norm (Rony et al. 2019), towards each of the closest classes k.
    r begins at 0, and length at the distance to the linearised boundary of k. In each step, with x_i = x + r:

    length *= 1 - gamma if x_i fools f, else 1 + gamma,   gamma from 0.2 to 0.01 along a cosine
    r += alpha length w / |w|,   w = grad f_k - grad f_y at x_i,   alpha from 0.5 to 0.01 along the same cosine
    r *= length / |r|, and x + r is clamped to [0,1]

    x_adv is the closest x_i that fooled f. The original attack lowers the likelihood of y, from a fixed first length,
    and often ends at a class that is not the closest.
    """
    x_adv, shortest = x.clone(), x.new_full((len(x),), torch.inf)  # shortest: the smallest |x_adv - x|
    distance = boundaries(f, x, y)[1]
    for k in distance.argsort(1)[:, :-1][:, :classes].unbind(1):  # the last is y, whose distance is infinite
        x_i = x
        length = pick(distance, k).clamp(1e-4, x.shape[1:].numel() ** 0.5)  # at most the diagonal of [0,1]^n
        for step in range(steps):
            logits, w = gradient_towards(f, x_i, y, k)
            r = x_i - x
            fooled = logits.argmax(1) != y
            closer = fooled & (l2(r) < shortest)
            x_adv = torch.where(broadcast(closer, x), x_i, x_adv)
            shortest = torch.where(closer, l2(r), shortest)
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            gamma, alpha = 0.01 + 0.19 * cosine, 0.01 + 0.49 * cosine
            length = torch.where(fooled, (1 - gamma) * length, (1 + gamma) * length)
            r = r + broadcast(alpha * length, x) * unit(w)
            x_i = (x + broadcast(length, x) * unit(r)).clamp(0, 1)
    return x_adv


@torch.no_grad()
def high_confidence_attack(f, x, target, confidence, steps=500, max_step=0.1, overshoot=0.02):
    """The attack of the paper's tests (Section 5): Eq. 7 in small steps, with x_adv clamped after each, until f
    classifies x_adv as the target with a probability of at least confidence, or until `steps` steps are taken.

    x_adv <- clamp(x_adv + (1 + overshoot) r_i),   r_i by Eq. 7 at x_adv (attack_step), cut to |r_i|_2 <= max_step

    confidence: a float in (0,1] (ValueError if not) or (N,). A failed attack keeps its last iterate.
    """
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)  # active: the images that are not finished yet
    for _ in range(steps):
        C = confidence[active] if isinstance(confidence, torch.Tensor) else confidence
        r_i, p, logits = attack_step(f, x_adv[active], target[active], C)
        unfinished = (p < C) | (logits.argmax(1) != target[active])
        active, r_i = active[unfinished], r_i[unfinished]
        if len(active) == 0:
            break
        r_i = broadcast(l2(r_i).clamp(max=max_step), x) * unit(r_i)
        x_adv[active] = (x_adv[active] + (1 + overshoot) * r_i).clamp(0, 1)
    return x_adv


@torch.no_grad()
def paper_attack(f, x, y):
    """The paper's attack in its test protocol (Section 5): high_confidence_attack to the class that is closest at x,
    and to the confidence that f has at x. Returns x_adv if f classifies it as this target, even with less than this
    confidence, else x."""
    target = closest_class(f, x, y)
    x_adv = high_confidence_attack(f, x, target, f(x).softmax(1).amax(1))
    is_target = f(x_adv).argmax(1) == target
    return torch.where(broadcast(is_target, x), x_adv, x)


ATTACKS = {"deepfool": deepfool, "cw": carlini_wagner, "paper": paper_attack, "ddn": ddn}


# --- Measuring a classifier ---------------------------------------------------------------------------------------

@torch.no_grad()
def batched_logits(f, x):
    """f(x) (N,K), computed in parts that fit into memory."""
    return torch.cat([f(part) for part in x.split(500)])


def error_rate(f, x, y):
    """The share of the images x (N,...) that f does not classify as y (N,), a float in [0,1]."""
    return (batched_logits(f, x).argmax(1) != y).sum().item() / len(y)


def check(f, x, y):
    """f's logits (N,K) at x. ValueError unless x holds images (N,...) in [0,1], y their labels (N,) int64, and f gives
    finite logits, K > 1, which do not depend on the other images."""
    if not (x.is_floating_point() and x.dim() > 1 and ((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} from {x.min():.7g} to {x.max():.7g}, expected images in [0,1]")
    logits = batched_logits(f, x)
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(f"f: logits of shape {tuple(logits.shape)}, expected ({len(x)}, K) with K > 1")
    if not logits.isfinite().all():
        raise ValueError("f: its logits at x are not finite")
    if (batched_logits(f, x[:1]) - logits[:1]).abs().max() > 0.01 * logits.abs().max():
        raise ValueError("f: an image alone gets other logits than among others, or f is random: put f into eval mode")
    if y.shape != (len(x),) or y.dtype != torch.int64 or not 0 <= y.min() <= y.max() < logits.shape[1]:
        raise ValueError(f"y: {y.dtype} {tuple(y.shape)} from {y.min()} to {y.max()}, expected f's int64 classes (N,)")
    return logits


def measure(f, x, y, attack, title=None):
    """How far attack(f, x, y) must move the images x (N,...) in [0,1] until f does not classify them as y (N,): a dict.

    x_adv    (N,...) what the attack returned for the images that f gets right, and x for the others
    length   (N,) |x_adv - x|_2; 0 if f gets x wrong already, infinite if x_adv does not fool f or leaves [0,1]
    rho      Eq. 8, over the finite lengths; failed: how many are infinite; seconds: how long it took

    With a title a terminal shows the progress. ValueError if x, y, f or the shape of x_adv is not what it should be.
    """
    began = time.perf_counter()
    right = check(f, x, y).argmax(1) == y
    x_adv, done = x.clone(), 0
    for some in right.nonzero().squeeze(1).split(2000 if x.is_cuda else 50):
        if title:
            progress(f"{title}: image", done, right.sum().item(), began)
        found = attack(f, x[some], y[some])
        if found.shape != x[some].shape:
            raise ValueError(f"attack: it returned {tuple(found.shape)} for images {tuple(x[some].shape)}")
        x_adv[some] = found.detach().to(x.dtype)
        done += len(some)
    progress()
    logits = batched_logits(f, x_adv)
    inside = ((x_adv - x_adv.clamp(0, 1)).abs() <= 1e-6).flatten(1).all(1)  # a rounding error is allowed
    fooled = (logits.argmax(1) != y) & logits.isfinite().all(1) & inside
    length = l2(x_adv - x).masked_fill(~fooled, torch.inf).masked_fill(~right, 0)
    return dict(x_adv=x_adv, length=length, rho=mean_rho(x, length), failed=length.isinf().sum().item(),
                seconds=time.perf_counter() - began)


def mean_rho(x, length):
    """Eq. 8 over the lengths (N,) of the perturbations. Infinite ones and black images are left out."""
    ratio = length / l2(x)
    return ratio[ratio.isfinite()].mean().item()


def vote(x, x_train, y_train, k=5):
    """The class (N,) of images x by the vote of their k nearest training images in l2; ties go to the nearest."""
    weight = 1 + 0.1 * 0.5 ** torch.arange(k, device=x.device, dtype=torch.float32)  # 1.1, 1.05, ...: for the ties
    nearest = torch.cat([torch.cdist(part.flatten(1), x_train.flatten(1)).topk(k, largest=False).indices
                         for part in x.split(250)])
    return (F.one_hot(y_train[nearest], 10) * weight[:, None]).sum(1).argmax(1)


def evaluate(f, x, y, attacks, x_train, y_train, title):
    """What the tables say of f on the images x, y: a dict with rho by each of the named attacks. "length" (N,) is the
    smallest length by any of them but the paper's, infinite if they all failed, and "rho" is Eq. 8 over it."""
    runs = {name: measure(f, x, y, ATTACKS[name], f"{title} {name}") for name in attacks}
    row = {name: run["rho"] for name, run in runs.items()}
    row["failed"] = {name: run["failed"] for name, run in runs.items()}
    row["seconds"] = {name: round(run["seconds"]) for name, run in runs.items()}
    lengths = [run["length"] for name, run in runs.items() if name != "paper"]
    if lengths:
        row["length"] = torch.stack(lengths).amin(0)
        row["rho"] = mean_rho(x, row["length"])
        row["at 1.5 %"] = 100 * (row["length"] > 1.5).float().mean().item()
    if "paper" in runs:  # Table 2, on the images that f gets right and that the paper's attack moved to its target
        success = (runs["paper"]["length"] > 0) & runs["paper"]["length"].isfinite()
        x_adv = runs["paper"]["x_adv"][success]
        voted, y_adv = vote(x_adv, x_train, y_train), batched_logits(f, x_adv).argmax(1)
        row["looks like target %"] = 100 * (voted == y_adv).float().mean().item()
        row["looks like original %"] = 100 * (voted == y[success]).float().mean().item()
    return row


# --- Networks and checkpoints -------------------------------------------------------------------------------------

class ConvPool(nn.Module):
    """Conv2d(1, 32, 5) and MaxPool2d(2), with which a training step of LeNet on a CPU takes a sixth less time:
    (N,1,28,28) -> (N,32,12,12). The four places of a pooling window lie in one 6x6 patch of x. The kernels, shifted to
    these places, give the window's values in one matrix product. The first of the largest stays, as in MaxPool2d."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        patches = x.squeeze(1).unfold(1, 6, 2).unfold(2, 6, 2).flatten(3)                          # (N,12,12,36)
        kernels = torch.cat([F.pad(self.weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)])
        values = F.linear(patches, kernels.flatten(1)).unflatten(3, (4, -1))                       # (N,12,12,4,32)
        return (values.max(3).values + self.bias).permute(0, 3, 1, 2)


def network(arch, device="cpu"):
    """A new classifier on the device. On a CPU LeNet begins with ConvPool, the same function of the same weights."""
    f = NETWORKS[arch]()
    if arch == "lenet" and torch.device(device).type == "cpu":
        f[0], f[1] = ConvPool(f[0]), nn.Identity()
    return f.to(device)


def read_checkpoint(path):
    """The dict in a checkpoint of train.py. OSError if the file cannot be read, ValueError if it is something else."""
    content = Path(path).read_bytes()
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        arch, *_ = [checkpoint["settings"][name] for name in ("arch", "defense", "seed", "data", "epochs")]
        network(arch).load_state_dict(checkpoint["f"])
        return checkpoint
    except Exception as error:  # a broken file can raise anything, from the unpickler to load_state_dict
        raise ValueError(f"{path} is no checkpoint of train.py, or a broken one ({type(error).__name__})") from None


def load_checkpoint(path, device="cpu"):
    """The classifier in a checkpoint of train.py, in eval mode on the device, and its settings. The "epochs" of a run
    that is not finished are a text such as "3 of 100". On a CPU LeNet's first two layers print as one, ConvPool.
    OSError if the file cannot be read, ValueError if it is no such checkpoint. No code in the file is run."""
    checkpoint = read_checkpoint(path)
    settings = checkpoint["settings"]
    f = network(settings["arch"], device)
    f.load_state_dict(checkpoint["f"])
    if "log" in checkpoint:  # not if the file holds weights alone
        done = max((row["epoch"] for row in checkpoint["log"]), default=0)
        if done < settings["epochs"]:
            settings["epochs"] = f"{done} of {settings['epochs']}"
    return f.eval(), settings


# --- Tables 1 and 2 -----------------------------------------------------------------------------------------------

PAPER_COLUMNS = ("test error %", "deepfool", "cw", "paper", "looks like target %", "looks like original %")
PAPER = {  # the paper's values, in this order
    "mlp reference": (1.46, .131, .124, .173, 0.57, 98.74), "lenet reference": (0.64, .157, .148, .207, 2.54, 96.53),
    "mlp at": (0.90, .228, .210, .299, 19.02, 77.21), "lenet at": (0.55, .215, .191, .286, 19.1, 75.94),
    "mlp vat": (0.84, .244, .215, .355, 35.08, 59.68), "lenet vat": (0.60, .225, .195, .330, 26.8, 67.73),
    "mlp margin": (0.84, .262, .230, .453, 60.47, 34.52), "lenet margin": (0.54, .248, .225, .470, 81.77, 13.15),
    "mlp critic": (1.18, .290, .272, .575, 87.99, 9.86), "lenet critic": (0.93, .288, .278, .590, 92.29, 6.51)}


def cell(rows, name):
    """The mean of one figure over rows that differ in the seed, ± its standard deviation, and the paper's value."""
    values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    digits = 2 if name == "test error %" else 1 if "%" in name else 3
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f"±{values.std():.{digits}f}"
    settings = rows[0]["settings"]
    paper = dict(zip(PAPER_COLUMNS, PAPER.get(f"{settings['arch']} {settings['defense']}", ())))
    if name in paper and settings["data"] == rows[0]["data"] == "mnist":
        text += f" ({paper[name]:.{digits}f})"
    return text


def table(rows, columns):
    """Lines of text: these columns of rows, with the rows that differ only in the seed on one line."""
    groups = {}
    for row in rows:
        groups.setdefault(str({**row["settings"], "seed": None}), []).append(row)
    lines = [["", "seeds", *columns]]
    for group in groups.values():
        path, settings = Path(group[0]["checkpoint"]), group[0]["settings"]
        name = f"{path.with_suffix('')}".removesuffix(f"-{settings['seed']}") + f", {settings['epochs']} epochs"
        lines.append([name, str(len(group)), *(cell(group, column) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for first, *others in lines]


def report(rows, attacks):
    """Lines of text: Tables 1 and 2, as far as the attacks allow."""
    images, columns = rows[0]["images"], ["rho", "at 1.5 %"] if "rho" in rows[0] else []
    paper = ", in brackets the paper's values" if rows[0]["data"] == "mnist" else ""
    lines = [f"Table 1: test error, and rho on {images}{paper}", *table(rows, ["test error %", *columns, *attacks]),
             "rho: the mean of |x_adv - x| / |x|, x_adv the closest image by any attack but the paper's",
             "at 1.5: the images that no change of length 1.5 or less was found to fool"]
    lines += [f"{row['checkpoint']}: {name} failed on {count} images, which are left out. That is no robustness."
              for row in rows for name, count in row["failed"].items() if count]
    if "paper" in attacks:
        lines += ["", f"Table 2: {images} under the paper's attack, by a vote of the 5 nearest training images",
                  *table(rows, ["looks like target %", "looks like original %"])]
    return lines


# --- Figures 2 and 4, and accuracy against perturbation -----------------------------------------------------------

def tile(images, columns):
    """Images (M,1,H,W) in [0,1], in rows of so many columns, twice as large, as one page (H',W')."""
    page = torch.vstack([torch.hstack(tuple(row)) for row in images[:, 0].cpu().split(columns)])
    return page.repeat_interleave(2, 0).repeat_interleave(2, 1)


def save_png(path, page):
    """Writes a page (H,W) of floats, clamped to [0,1], as 8-bit greyscale PNG."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    lines = F.pad((255 * page.clamp(0, 1)).round().byte(), (1, 0))  # each line begins with its filter, 0: none
    header = struct.pack(">IIBBBBB", page.shape[1], page.shape[0], 8, 0, 0, 0, 0)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                           + chunk(b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)) + chunk(b"IEND", b""))


def figure_2(f, x, y, x_train, y_train):
    """A page with a row for each class and a column for each target: the attack to C = 0.95, dimmed if it did not reach
    C, and on the diagonal the clean image in a white frame. Also how many of the 90 attacks reached C, and how many of
    the 90 look like their target to the nearest training images. ValueError if x lacks a class."""
    digits = torch.arange(10, device=x.device)
    target, of_class = digits.repeat(10), y == digits[:, None]
    if not of_class.any(1).all():
        raise ValueError("Figure 2 needs an image of each class")
    first = of_class.int().argmax(1).repeat_interleave(10)  # of each class its first image, ten times
    grid, off_diagonal = x[first], digits.repeat_interleave(10) != target
    grid[off_diagonal] = high_confidence_attack(f, grid[off_diagonal], target[off_diagonal], 0.95)
    reached = off_diagonal & (pick(batched_logits(f, grid).softmax(1), target) >= 0.95 - 1e-6)
    alike = off_diagonal & (vote(grid, x_train, y_train) == target)
    grid[off_diagonal & ~reached] *= 0.35
    framed = torch.where(broadcast(off_diagonal, grid), F.pad(grid, (2, 2, 2, 2)), F.pad(grid, (2, 2, 2, 2), value=1))
    return tile(framed, 10), reached.sum().item(), alike.sum().item()


def save_svg(path, title, rows):
    """Writes as SVG, with a curve for each row, accuracy against the l2 length of the perturbation, 0 to 2.5."""
    def text(x, y, words, anchor="middle", colour="black"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    def line(points, colour, width):
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 440" font-family="sans-serif" font-size="20">',
             '<rect width="640" height="440" fill="white"/>', text(10, 26, title, "start"),
             text(270, 432, "l2 length of the perturbation")]
    parts += [text(70 + 80 * i, 400, f"{i / 2}") for i in range(6)]
    for percent in (0, 25, 50, 75, 100):
        y = 375 - 3.2 * percent
        parts += [line(f"70,{y} 470,{y}", "#ddd", 1), text(60, y + 7, f"{percent}%", "end")]
    colours = dict(reference="black", at="#56b4e9", vat="#009e73", margin="#e69f00", pgd="#cc79a7", critic="#d55e00")
    label_y = math.inf
    for row in sorted(rows, key=lambda row: (row["length"] > 2.5).sum()):  # begins with the curve that ends lowest
        defense = row["settings"]["defense"]
        height = [375 - 320 * (row["length"] > i / 20).float().mean().item() for i in range(51)]
        points = " ".join(f"{70 + 8 * i},{y:.1f}" for i, y in enumerate(height))
        parts.append(line(points, colours[defense], 6 if defense == "critic" else 2.5))
        label_y = min(height[-1] + 7, label_y - 22)  # at least 22 above the label before
        parts.append(text(478, label_y, defense, "start", colours[defense]))
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def draw(folder, rows, networks, x, y, x_train, y_train):
    """Draws Figure 2 of each network; its Figure 4, eight images clean, at the class boundary (DDN) and under the
    paper's attack; and for each architecture the accuracy against the length of the perturbation."""
    wrong = sum((batched_logits(f, x).argmax(1) != y).int() for f in networks)
    x, y = x[wrong.argsort(stable=True)], y[wrong.argsort(stable=True)]  # first those that all the networks get right
    for row, f in zip(rows, networks):
        name = Path(row["checkpoint"]).stem
        page, reached, alike = figure_2(f, x, y, x_train, y_train)
        save_png(folder / f"figure2-{name}.png", page)
        images = torch.cat([x[:8], ddn(f, x[:8], y[:8]), paper_attack(f, x[:8], y[:8])])
        save_png(folder / f"figure4-{name}.png", tile(images, 8))
        row["figure 2"] = {"reach 95%": reached, "look like target": alike}
        print(f"figure2-{name}.png: {reached} of 90 attacks reach 95%, {alike} look like their target", flush=True)
    for arch in NETWORKS:
        curves = [row for row in rows if row["settings"]["arch"] == arch and "length" in row]
        if curves:
            save_svg(folder / f"accuracy-{arch}.svg", f"{arch}: accuracy under attack", curves)


# --- Command line -------------------------------------------------------------------------------------------------

def use_float32():
    """float32 means float32 on a GPU too: no TF32 in convolutions and matrix products, whoever switched it on."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def progress(text="", done=0, total=0, began=0.0):
    """Shows how far the work is, as the one changing line of a terminal; without text clears this line."""
    if sys.stderr and sys.stderr.isatty():
        minutes = (time.perf_counter() - began) / 60 * (total - done) / max(done, 1)
        text += (f" {done} of {total}" if total else "") + (f", {minutes:.1f} minutes left" if done else "")
        print(f"\r{text[-79:]:<79}\r", end="", file=sys.stderr, flush=True)


def add_data_flags(parser, default):
    """--data, --data-dir and --device, for train.py too."""
    parser.add_argument("--data", choices=["mnist", "drawn"], default=default, help="drawn: digits that the computer "
                        f"draws, without a download (default: {default or 'as the checkpoints were trained'})")
    parser.add_argument("--data-dir", metavar="DIR", help="where MNIST's files are (default: $MNIST_DIR, else data)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: CUDA where there is one")


def parse_flags(argv):
    """The command line as argparse has it, with the attacks and the checkpoints as lists."""
    parser = argparse.ArgumentParser(description="Attacks networks, prints Tables 1 and 2.", allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files of train.py, also as 'runs/*.pt'")
    parser.add_argument("--n", type=int, default=500, help="attack the first N of a fixed permutation of the test "
                        "images (default 500); the test error is always over all 10,000")
    parser.add_argument("--attacks", default="deepfool,paper,ddn", metavar="NAME,...",
                        help="out of deepfool, cw (Carlini and Wagner; slow), paper, ddn (default: all but cw)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw Figures 2 and 4 and accuracy curves into DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to this new file")
    add_data_flags(parser, default=None)
    args = parser.parse_args(argv)
    args.attacks = list(dict.fromkeys(args.attacks.split(",")))
    if not set(args.attacks) <= set(ATTACKS):
        parser.error(f"--attacks: expected names out of {','.join(ATTACKS)}")
    if not 1 <= args.n <= 10000:
        parser.error("--n: expected 1 to 10000")
    paths = [path for text in args.checkpoints for path in sorted(glob.glob(text, recursive=True)) or [text]]
    args.checkpoints = list(dict.fromkeys(paths))
    if args.figures and len({Path(path).stem for path in paths}) < len(args.checkpoints):
        parser.error("--figures: two checkpoints have the same name, and so would their pictures")
    return args


def save_json(path, rows):
    """Writes rows as a list of JSON objects. JSON has no Infinity and no NaN: both become null."""
    rows = json.loads(json.dumps(rows, default=torch.Tensor.tolist), parse_constant=lambda name: None)
    data.replace(path, ("[" + ",\n".join(map(json.dumps, rows)) + "]\n").encode())


def run_command(args):
    """Attacks the networks, prints the tables, and writes what --json and --figures ask for. OSError or ValueError."""
    if args.json and args.json.exists():
        raise FileExistsError(f"--json: {args.json} is there already")
    use_float32()
    loaded = [load_checkpoint(path, args.device) for path in args.checkpoints]
    source, *others = {args.data or settings["data"] for _, settings in loaded}
    if others:
        raise ValueError("some checkpoints were trained on MNIST, some on drawn digits: choose with --data")
    x_train, y_train, x, y = (part.to(args.device) for part in data.load(source, args.data_dir))
    x_train, y_train = x_train[10000:], y_train[10000:]  # without those that are held out for validation
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).to(args.device)
    for folder in filter(None, (args.figures, args.json and args.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    some, rows = order[:args.n], []
    try:
        for i, (path, (f, settings)) in enumerate(zip(args.checkpoints, loaded), 1):
            row = {"checkpoint": path, "settings": settings, "data": source, "images": f"{args.n} {source} test images",
                   "torch": torch.__version__, "test error %": 100 * error_rate(f, x, y)}
            row.update(evaluate(f, x[some], y[some], args.attacks, x_train, y_train, f"[{i}/{len(loaded)}] {path}"))
            rows.append(row)
            if args.json:
                save_json(args.json, rows)
    finally:  # the networks that are finished, also after Ctrl-C or on a full disk
        progress()
        if rows:
            print("\n".join(report(rows, args.attacks)), flush=True)
    if args.figures:
        draw(args.figures, rows, [f for f, _ in loaded], x[order[:500]], y[order[:500]], x_train, y_train)
        if args.json:
            save_json(args.json, rows)


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        run_command(parse_flags(argv))
        return 0
    except KeyboardInterrupt:
        print("\neval.py: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
