"""How robust is a trained classifier? Tables 1 and 2, Figures 2 and 4, and two checks that the robustness is real.

    python eval.py results/lenet-critic.pt          500 images in 2 min 23 s on two CPU cores
    python eval.py runs/*.pt --n 100 --attacks deepfool,cw,own,ddn --figures results --json results/all.json

Prints the tables, the paper's values in brackets: a line for each defense and network, with mean±standard deviation
over checkpoints that differ only in the seed. The attacks are functions of any classifier f, images x and labels y.
"""
import argparse
import json
import math
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
from advcritic import attack, boundaries, closest_class, lenet, mlp

NETWORKS = {"lenet": lenet, "mlp": mlp}
DATA = ("mnist", "strokes")


# --- The classifiers ----------------------------------------------------------------------------------------------

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


# --- Eq. 8: rho ---------------------------------------------------------------------------------------------------

def rho(x, x_adv):
    """|x_adv - x|_2 / |x|_2 of each image (Eq. 8 before the mean): (N,), nan where x is black (norm 0)."""
    norm = x.flatten(1).norm(dim=1)
    return torch.where(norm > 0, (x_adv - x).flatten(1).norm(dim=1) / norm, torch.nan)


# --- The attacks: images x (N,...) in [0,1], labels y (N,) -> x_adv (N,...) in [0,1] ------------------------------

def per_image(value, x):
    """value (N,) in a shape that multiplies and selects images x (N,...)."""
    return value.view(-1, *[1] * (x.dim() - 1))


def unit(v):
    """v (N,...) divided by its l2 length, image by image."""
    return v / per_image(v.flatten(1).norm(dim=1).clamp(min=1e-12), v)


def where_fooled(f, x, y, x_adv):
    """x_adv where f does not classify it as y, x elsewhere: what an attack promises is checked on what it returns."""
    return torch.where(per_image(f(x_adv).argmax(1) != y, x), x_adv, x)


@torch.no_grad()
def deepfool(f, x, y, steps=500, max_step=0.1, overshoot=0.02):
    """l2 DeepFool (Moosavi-Dezfooli, Fawzi and Frossard 2016), to the closest boundary, the class chosen anew at
    each step:

    r += (min(|f_k - f_y| / |w|, max_step) + 1e-4) w / |w|,   w = grad f_k - grad f_y,   all at x + r

    until x_adv = clamp(x + (1 + overshoot) r) is not classified as y; r is taken back from the clamped image. The
    1e-4 makes the step cross the boundary on which it would end. max_step=0.1 is the paper's, None takes full steps.
    Returns x_adv, detached; x itself where f is wrong at x, and where the attack fails.
    """
    x = x.detach()
    x_adv, r = x.clone(), torch.zeros_like(x)
    live = (f(x).argmax(1) == y).nonzero().squeeze(1)
    for _ in range(steps):
        if len(live) == 0:
            break
        distance, w = boundaries(f, (x + r)[live], y[live])
        length, k = distance.min(1)
        if max_step is not None:
            length = length.clamp(max=max_step)
        w = w[torch.arange(len(live), device=x.device), k]
        r_i = ((length + 1e-4) / w.norm(dim=1).clamp(min=1e-12))[:, None] * w
        x_i = (x[live] + (1 + overshoot) * (r[live] + r_i.view_as(x[live]))).clamp(0, 1)
        x_adv[live], r[live] = x_i, (x_i - x[live]) / (1 + overshoot)
        live = live[f(x_i).argmax(1) == y[live]]
    x_adv[live] = x[live]
    return x_adv


@torch.no_grad()
def carlini_wagner(f, x, y, steps=1000, search_steps=9, lr=0.01):
    """The untargeted l2 attack of Carlini and Wagner (2017). Adam on w, with x_adv = (tanh w + 1) / 2, minimises

    |x_adv - x|_2^2 + c max(0, f_y - max_{k != y} f_k)

    from w = atanh(0.999999 (2x - 1)): without the factor a pixel of 0 or 1 has no gradient. c begins at 1e-3; after
    each of the search steps it is bisected, or multiplied by 10 as long as no c has fooled f. An image leaves a
    search step once a fortieth of the steps has not lowered its own best loss by 0.1%; in the first half only if this
    loss has fallen before: a pixel of 0 or 1 needs hundreds of steps to come out of where tanh is flat.
    Returns the closest x_adv that fooled f, detached; x itself where f is wrong at x, and where the attack fails.
    """
    x = x.detach()
    x_adv, shortest = x.clone(), x.new_full((len(x),), math.inf)  # shortest: |x_adv - x|^2
    low, c, high = (x.new_full((len(x),), value) for value in (0, 1e-3, math.inf))
    right = (f(x).argmax(1) == y).nonzero().squeeze(1)
    for _ in range(search_steps):
        live, found = right, torch.zeros_like(y, dtype=torch.bool)
        w = (0.999999 * (2 * x[live] - 1)).atanh()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        first = best = last = torch.full_like(c[live], math.inf)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                w.requires_grad_()
                x_i = (w.tanh() + 1) / 2
                f_x, label = f(x_i), y[live, None]
                gap = (f_x.gather(1, label) - f_x.scatter(1, label, -math.inf).amax(1, True)).squeeze(1)
                square = (x_i - x[live]).flatten(1).square().sum(1)
                loss = square + c[live] * gap.clamp(min=0)
                grad, = torch.autograd.grad(loss.sum(), w)
            found[live] |= gap < 0
            closer = (gap < 0) & (square < shortest[live])
            x_adv[live] = torch.where(per_image(closer, x), x_i, x_adv[live])
            shortest[live] = torch.where(closer, square, shortest[live])
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()  # Adam
            w = w.detach() - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
            best, first = torch.minimum(best, loss), loss if step == 1 else first
            if step % max(1, steps // 40) == 0:
                go_on = (best < 0.999 * last) | (best > 0.995 * first) & (step < steps / 2)
                live, w, m, v, first, best, last = (part[go_on] for part in (live, w, m, v, first, best, best))
                if len(live) == 0:
                    break
        low, high = torch.where(found, low, c), torch.where(found, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return where_fooled(f, x, y, x_adv)


@torch.no_grad()
def ddn(f, x, y, steps=1000):
    """The l2 attack by decoupled direction and norm (Rony et al. 2019). From r = 0 and length 1, in each step:

    r += alpha g / |g|,   g = grad NLL(f(x + r), y),   alpha from 1 to 0.01 along a cosine
    length *= 0.95 if f(x + r) was not y, else 1.05;   r is set to this length, then x + r clamped to [0,1].
    Returns the closest x_adv that fooled f, detached; x itself where f is wrong at x, and where the attack fails.
    """
    x, y = x.detach(), y[:, None]
    x_adv, r = x.clone(), torch.zeros_like(x)
    length, shortest = x.new_ones(len(x)), x.new_full((len(x),), math.inf)
    for step in range(steps):
        with torch.enable_grad():
            x_i = (x + r).requires_grad_()
            f_x = f(x_i)
            # grad NLL is (1 - p_y) times this gradient: the same direction, also where float32 rounds p_y to 1.
            f_y, others = f_x.gather(1, y), f_x.scatter(1, y, -math.inf)
            grad, = torch.autograd.grad((others.logsumexp(1, True) - f_y).sum(), x_i)
        fooled, norm = (others.amax(1, True) > f_y).squeeze(1), r.flatten(1).norm(dim=1)
        closer = fooled & (norm < shortest)
        x_adv, shortest = torch.where(per_image(closer, x), x_i, x_adv), torch.where(closer, norm, shortest)
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        length = torch.where(fooled, 0.95 * length, 1.05 * length).clamp(max=x.flatten(1).shape[1] ** 0.5)
        r = (x + per_image(length, x) * unit(r + alpha * unit(grad))).clamp(0, 1) - x
    return where_fooled(f, x, y.squeeze(1), x_adv.detach())


IN_THE_TEST = dict(steps=500, overshoot=0.02, max_step=0.1, box=(0, 1))


@torch.no_grad()
def own(f, x, y):
    """The paper's own attack in its test protocol (Section 5): the target is the class closest to x, the confidence
    that of f at x, at most 500 steps of length at most 0.1, each projected to [0,1].
    Returns x_adv, detached, also where it is classified as the target but did not reach the confidence; x itself
    where f is wrong at x, and where the attack does not end in its target.
    """
    probability, label = f(x).softmax(1).max(1)
    target, right = closest_class(f, x, y), (label == y).nonzero().squeeze(1)
    x_adv = x.detach().clone()
    x_adv[right] = attack(f, x[right], target[right], probability[right], **IN_THE_TEST)
    return torch.where(per_image(f(x_adv).argmax(1) == target, x), x_adv, x)


ATTACKS = {"deepfool": deepfool, "cw": carlini_wagner, "own": own, "ddn": ddn}


# --- Measuring a classifier ---------------------------------------------------------------------------------------

@torch.no_grad()
def logits(f, x):
    """f(x), computed in parts that fit into memory."""
    return torch.cat([f(part) for part in x.split(500)])


def error_rate(f, x, y):
    """The share of the images x that f does not classify as y, a float in [0,1]."""
    return percent(logits(f, x).argmax(1) != y) / 100


def percent(which):
    """The share of True, in percent."""
    return 100 * which.double().mean().item()


def mean_rho(x, length):
    """Eq. 8 from the lengths (N,) of the perturbations, without infinite ones and without black images."""
    ratio = length / x.flatten(1).norm(dim=1)
    return ratio[ratio.isfinite()].mean().item()


def measure(f, x, y, method, label=None):
    """Attacks the images x with method(f, x, y); with a label it shows its progress on a terminal. A dict:

    x_adv    (N,...) what method returned; all that follows is found from it alone
    length   (N,) |x_adv - x|_2; 0 where f is wrong by itself, infinite where x_adv is still classified as y
    rho      Eq. 8, without the images that were not fooled; failed: their number; seconds: wall-clock time
    """
    start, parts, show = time.perf_counter(), [], label and sys.stderr.isatty()
    for some in torch.arange(len(x), device=x.device).split(2000 if x.is_cuda else 50):
        if show:
            done, seconds = some[0].item(), time.perf_counter() - start
            left = f", {seconds * (len(x) / done - 1):.0f} s left" if done else ""
            print(f"\r{label}: {done} of {len(x)} images{left}\033[K", end="", file=sys.stderr, flush=True)
        parts.append(method(f, x[some], y[some]))
    print("\r\033[K" * bool(show), end="", file=sys.stderr, flush=True)
    x_adv = torch.cat(parts)
    length = (x_adv - x).flatten(1).norm(dim=1)
    fooled = (logits(f, x_adv).argmax(1) != y) & length.isfinite()
    length, failed = torch.where(fooled, length, math.inf), (~fooled).sum().item()
    return dict(x_adv=x_adv, length=length, rho=mean_rho(x, length), failed=failed, seconds=time.perf_counter() - start)


def vote(x, x_train, y_train, k=5):
    """The class (N,) of images x by the vote of their k nearest training images in l2; ties go to the nearest."""
    weight = 1 + 0.1 * 0.5 ** torch.arange(k, device=x.device)
    nearest = torch.cat([torch.cdist(part.flatten(1), x_train.flatten(1)).topk(k, largest=False).indices
                         for part in x.split(250)])
    return (F.one_hot(y_train[nearest], int(y_train.max()) + 1) * weight[:, None]).sum(1).argmax(1)


def evaluate(f, x, y, attacks, x_train, y_train, label):
    """What the tables say of f on the images x, y under the named attacks: a dict of figures by the tables' headings,
    and as "length" (N,) the lengths of DDN's perturbations."""
    right = logits(f, x).argmax(1) == y
    runs = {name: measure(f, x, y, ATTACKS[name], f"{label} {name}") for name in attacks}
    row = {name: run["rho"] for name, run in runs.items()}
    row |= {key: [run[key] for run in runs.values()] for key in ("failed", "seconds")}
    if lengths := [run["length"] for name, run in runs.items() if name != "own"]:
        worst = torch.stack(lengths).amin(0)
        row |= {"worst": mean_rho(x, worst), "at 1.5 %": percent(worst > 1.5)}
    if "own" in runs:  # Table 2, on the images that f gets right and the attack moved to its target
        moved = right & runs["own"]["length"].isfinite()
        x_0, x_1, y_0 = x[moved], runs["own"]["x_adv"][moved], y[moved]
        before, after = (logits(f, images).softmax(1).max(1) for images in (x_0, x_1))
        noise = unit(torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x))
        noise *= per_image((x_1 - x_0).flatten(1).norm(dim=1), x)
        voted, clean, noisy = (vote(images, x_train, y_train) for images in (x_1, x_0, x_0 + noise))
        row |= {"change %": percent(voted == after.indices), "no change %": percent(voted == y_0),
                "clean error %": percent(clean != y_0), "noise: no change %": percent(noisy == y_0),
                "images": [len(y_0)], "reached %": percent(after.values >= before.values - 1e-6)}
    if "ddn" in runs:  # signs of masked gradients
        row["length"] = length = runs["ddn"]["length"]
        row["failed %"], first = percent(length.isinf()), length[:100]
        more = measure(f, x[:100], y[:100], lambda f, x, y: ddn(f, x, y, steps=2000), f"{label} ddn, 2,000 steps")
        more, first = more["length"] + 0 * first, first + 0 * more["length"]  # nan, so left out, where either failed
        row["gain %"] = 100 * (1 - mean_rho(x[:100], more) / (mean_rho(x[:100], first) or math.nan))
        if "deepfool" in runs:
            row["half %"] = percent((length < runs["deepfool"]["length"] / 2)[right])
    return row


# --- Checkpoints --------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """The dict in a checkpoint of train.py, on the CPU, with its settings and finite weights of f at least. Runs no
    code from the file. OSError where it cannot be read, ValueError where it is no such checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arch, *_, source = (checkpoint["settings"][name] for name in ("arch", "defense", "seed", "epochs", "data"))
        NETWORKS[arch]().load_state_dict(checkpoint["f"])
        if damaged or source not in DATA or not all(part.isfinite().all() for part in checkpoint["f"].values()):
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

PAPER_COLUMNS = ("test error %", "deepfool", "cw", "own", "change %", "no change %")
PAPER = {  # its values, in this order
    "mlp reference": (1.46, .131, .124, .173, 0.57, 98.74), "lenet reference": (0.64, .157, .148, .207, 2.54, 96.53),
    "mlp at": (0.90, .228, .210, .299, 19.02, 77.21), "lenet at": (0.55, .215, .191, .286, 19.1, 75.94),
    "mlp vat": (0.84, .244, .215, .355, 35.08, 59.68), "lenet vat": (0.60, .225, .195, .330, 26.8, 67.73),
    "mlp margin": (0.84, .262, .230, .453, 60.47, 34.52), "lenet margin": (0.54, .248, .225, .470, 81.77, 13.15),
    "mlp critic": (1.18, .290, .272, .575, 87.99, 9.86), "lenet critic": (0.93, .288, .278, .590, 92.29, 6.51)}


def print_table(groups, names):
    """A line for each group of rows: its name and seeds, and the figures of these names, the paper's in brackets."""
    lines = [["", "seeds", *(name + " (paper)" * (name in PAPER_COLUMNS) for name in names)]]
    for group in groups:
        lines.append([group[0]["name"], str(len(group))])
        for name in names:
            values = torch.tensor([row[name] for row in group], dtype=torch.float64)
            digits = 2 if "error" in name else 1 if "%" in name else 3
            cell = f"{values.mean():.{digits}f}"
            if values.dim() == 2:  # a figure for each attack, over all seeds
                cell = "/".join(f"{value:.0f}" for value in values.sum(0))
            elif len(group) > 1:
                cell += f"±{values.std():.{digits}f}"
            paper = group[0]["paper"].get(name)
            lines[-1].append(cell + (f" ({paper:.{digits}f})" if paper else ""))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *cells in lines:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


def print_results(groups, attacks, caption):
    """Table 1, Table 2, and a line for each checkpoint on gradient masking, as far as the attacks allow."""
    rows = sum(groups, [])
    print(f"Table 1: test error, and rho on {caption} under each attack")
    print_table(groups, ["test error %", *attacks, *["worst", "at 1.5 %"] * ("worst" in rows[0]), "failed", "seconds"])
    print("rho: mean |x_adv - x| / |x|, 0 where f is wrong by itself; worst: the smallest of each image, own left out\n"
          "at 1.5: accuracy when |r| = 1.5; failed: left out of the mean of rho, accurate at 1.5; failed and seconds: "
          + "/".join(attacks))
    if "own" in attacks:
        print("\nTable 2: images under the paper's attack, labelled by the 5 nearest training images instead of people")
        print_table(groups, ["change %", "no change %", "clean error %", "noise: no change %", "images", "reached %"])
        print("change: labelled as the target; clean error: of these labels without attack; noise: random, of the same "
              "length\nreached: attacks that came within 1e-6 of the clean image's confidence")
    for row in rows:
        notes = [text.format(row[name]) + f" SUSPICIOUS: above {limit}%, masked gradients?" * (row[name] > limit)
                 for name, limit, text in (("half %", 10, "DDN needs less than half of DeepFool's length on {:.1f}%"),
                                           ("gain %", 2, "DDN in 2,000 steps lowers rho by {:.1f}%"),
                                           ("failed %", 1, "DDN fails on {:.1f}%")) if name in row]
        if notes:
            print("\n" * (row is rows[0]) + f"{row['checkpoint']}: {'; '.join(notes)}")


def save_json(path, rows, protocol):
    """Writes every figure, a line for each row, and how it was measured; null for what is infinite or not a number."""
    lines = [json.dumps(json.loads(json.dumps(row, default=torch.Tensor.tolist), parse_constant=lambda _: None))
             for row in rows]
    path.write_text(f'{{"protocol": {json.dumps(protocol)},\n"results": [\n' + ",\n".join(lines) + "\n]}\n")


# --- Figures 2 and 4, and accuracy against perturbation -----------------------------------------------------------

def tile(images, columns):
    """Images (M,1,H,W) in [0,1], in rows of so many columns, twice as large, as one page (H',W') in a white frame."""
    height, width = images.shape[2:]
    page = images.reshape(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width).cpu()
    return F.pad(page.repeat_interleave(2, 0).repeat_interleave(2, 1), (8, 8, 8, 8), value=1)


def save_png(path, page):
    """Writes a page (H,W) in [0,1] as 8-bit greyscale PNG."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    lines = F.pad((255 * page).round().byte(), (1, 0))  # each line begins with its filter, 0: none
    header = struct.pack(">IIBBBBB", page.shape[1], page.shape[0], 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)) + chunk(b"IEND", b""))
    print(path)


def figure_2(f, x, y):
    """A page: on the diagonal an image of each class, in its row the attacks on it to all other classes, C = 0.95."""
    digits = torch.arange(10, device=x.device)
    original, target = digits.repeat_interleave(10), digits.repeat(10)
    grid, off = x[(y == digits[:, None]).int().argmax(1)][original], original != target
    grid[off] = attack(f, grid[off], target[off], 0.95, **IN_THE_TEST)
    return tile(grid, 10)


def figure_4(f, x, y):
    """A page of rows a, b, c: clean images, the same at the boundary (by DDN; the paper took Carlini-Wagner), and at
    the clean image's confidence (by the paper's attack). Prints the mean confidence in each row."""
    rows = [x[:14], ddn(f, x[:14], y[:14]), own(f, x[:14], y[:14])]
    sure = [100 * logits(f, row).softmax(1).amax(1).mean().item() for row in rows]
    print("Mean confidence: a (clean) {:.0f}%, b (boundary) {:.0f}%, c (the paper's attack) {:.0f}%".format(*sure))
    return tile(torch.cat(rows), len(rows[0]))


COLOURS = dict(reference="black", at="#56b4e9", vat="#009e73", margin="#e69f00", pgd="#cc79a7", critic="#d55e00")


def save_svg(path, title, groups):
    """Writes accuracy against the l2 length of DDN's perturbations, a curve for each group of rows, as SVG."""
    def text(x, y, words, anchor="middle"):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'

    def line(colour, *points):
        return f'<polyline points="{" ".join(f"{x:.0f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}"/>'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 400" font-family="sans-serif" font-size="14">',
             '<rect width="820" height="400" fill="white"/>', text(60, 24, title, "start"),
             text(300, 388, "l2 length of the perturbation, images in [0,1]"),
             *(text(60 + 60 * i, 361, i / 2) for i in range(9)),
             *(line("#ddd", (60, y), (540, y)) + text(36, y + 5, f"{(340 - y) // 3}%") for y in range(40, 341, 60)),
             '<g stroke-width="2.5">']
    for i, group in enumerate(groups):
        length, colour = torch.cat([row["length"] for row in group]), COLOURS.get(group[0]["settings"]["defense"])
        parts += [line(colour, *((60 + 6 * r, 340 - 3 * percent(length > r / 20)) for r in range(81))),
                  line(colour, (550, 54 + 24 * i), (574, 54 + 24 * i))]
    parts += ["</g>", *(text(582, 59 + 24 * i, group[0]["name"], "start") for i, group in enumerate(groups))]
    path.write_text("\n".join([*parts, "</svg>\n"]))
    print(path)


def draw(folder, groups, networks, x, y, caption):
    """For each architecture figures 2 and 4 of its reference and critic, and the accuracy of all groups."""
    for arch in NETWORKS:
        if shown := [networks[name] for name in (f"{arch} reference", f"{arch} critic") if name in networks]:
            right = torch.stack([logits(f, x).argmax(1) == y for f in shown]).all(0)
            some = right.int().argsort(descending=True, stable=True)  # first what all of them get right
            save_png(folder / f"figure2-{arch}.png", torch.cat([figure_2(f, x[some], y[some]) for f in shown], 1))
            save_png(folder / f"figure4-{arch}.png", torch.cat([figure_4(f, x[some], y[some]) for f in shown]))
        if mine := [group for group in groups if group[0]["settings"]["arch"] == arch and "length" in group[0]]:
            save_svg(folder / f"accuracy-{arch}.svg", f"{arch}: accuracy under attack (DDN), {caption}", mine)


# --- Command line -------------------------------------------------------------------------------------------------

def number(kind, low, high=float("inf")):
    """An argparse type: kind (int or float), finite and between low and high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            limit = f" and at most {high}" * (high < float("inf"))
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low}{limit}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def add_data_flags(parser, default):
    """--data, --data-dir and --device, as train.py has them too."""
    parser.add_argument("--data", choices=DATA, default=default, help="MNIST, or drawn digits that need no download")
    parser.add_argument("--data-dir", help="folder of MNIST's four files (default $MNIST_DIR, else data)")
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: CUDA where there is one")


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files that train.py wrote")
    parser.add_argument("--n", type=number(int, 1, 10000), help="attack the first N of a fixed permutation of the test "
                        "images (default: all on CUDA, 500 on a CPU); the test error is always over all 10,000")
    parser.add_argument("--attacks", help=f"default {','.join(ATTACKS)}; on a CPU without cw, which takes long")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the pictures into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all figures and how they were measured")
    add_data_flags(parser, default=None)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    attacks = (list(dict.fromkeys(args.attacks.split(","))) if args.attacks is not None else
               [name for name in ATTACKS if cuda or name != "cw"])
    n = args.n or (10000 if cuda else 500)
    if unknown := {*attacks} - {*ATTACKS}:
        parser.error(f"--attacks: unknown {', '.join(unknown)}: choose from {','.join(ATTACKS)}")
    if args.figures and args.figures.is_file():
        parser.error(f"--figures: {args.figures} is a file, expected a folder")
    try:
        loaded = [load_checkpoint(path, args.device) for path in args.checkpoints]
        for path, (_, settings) in zip(args.checkpoints, loaded):
            if [settings == other for _, other in loaded].count(True) > 1:
                raise ValueError(f"{path} is given twice, or another checkpoint is of the same settings and seed")
        trained_on = {settings["data"] for _, settings in loaded}
        if not args.data and len(trained_on) > 1:
            raise ValueError(f"the checkpoints were trained on {' and '.join(trained_on)}: name one with --data")
        source = args.data or trained_on.pop()
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
        sets = (data.load_mnist(args.data_dir) if source == "mnist" else
                [*data.stroke_digits(20000, seed=0), *data.stroke_digits(10000, seed=1)])
        if args.json:
            args.json.open("a").close()  # whether it can be written is known now, not after the last attack
    except (OSError, ValueError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    x_train, y_train, x, y = (part.to(args.device) for part in (sets[0][10000:], sets[1][10000:], *sets[2:]))
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).to(args.device)
    some, caption, groups, status = order[:n], f"{n} {source} test images", {}, 0
    try:
        for i, (path, (f, s)) in enumerate(zip(args.checkpoints, loaded), 1):
            figures = evaluate(f, x[some], y[some], attacks, x_train, y_train, f"[{i}/{len(loaded)}] {path}")
            paper = PAPER.get(f"{s['arch']} {s['defense']}", ()) if source == "mnist" else ()
            row = {"name": Path(path).stem.removesuffix(f"-{s['seed']}") + f", {s['epochs']} epochs",
                   "checkpoint": path, "settings": s, "paper": dict(zip(PAPER_COLUMNS, paper)),
                   "test error %": 100 * error_rate(f, x, y), **figures}
            groups.setdefault(str(sorted({**s, "seed": 0}.items())), []).append(row)  # the same but for the seed
    except KeyboardInterrupt:
        print(f"\nInterrupted in {path}, {i} of {len(loaded)}.", file=sys.stderr)
        status = 130
        if not groups:
            return status
    groups = list(groups.values())
    print_results(groups, attacks, caption)
    if args.json:
        save_json(args.json, sum(groups, []), {
            "images": f"first {n} of torch.randperm(10000), seed 0, of the test set of {source}",
            "attacks": {name: ATTACKS[name].__doc__ for name in attacks},
            "device": args.device, "torch": torch.__version__})
    if args.figures:
        networks = {f"{s['arch']} {s['defense']}": f for f, s in reversed(loaded)}  # the first of each
        draw(args.figures, groups, networks, x[order[:500]], y[order[:500]], caption)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
