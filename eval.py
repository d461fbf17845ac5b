"""How robust is a trained classifier? Test error, and rho (Eq. 8) under DeepFool and the paper's own attack.

    python eval.py runs/lenet-critic-0.pt runs/lenet-reference-0.pt
    python eval.py runs/*.pt --n 1000

Prints a table with a row for each defense and network, mean and standard deviation over checkpoints that differ only
in the seed. The attacks are plain functions of a classifier f, images x and labels y, to be used on any classifier.
"""
import argparse
import sys
import time
import warnings
import zipfile

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's only complaint where numpy is not

import torch

import data
from advcritic import attack, boundaries, closest_class, lenet, mlp

NETWORKS = {"lenet": lenet, "mlp": mlp}
DATA = ("mnist", "strokes")


# --- Eq. 8: rho ---------------------------------------------------------------------------------------------------

def rho(x, x_adv):
    """|x_adv - x|_2 / |x|_2 of each image (Eq. 8 before the mean): (N,), nan where x is black (norm 0)."""
    norm = x.flatten(1).norm(dim=1)
    return torch.where(norm > 0, (x_adv - x).flatten(1).norm(dim=1) / norm, torch.nan)


# --- The attacks: images x (N,...) in [0,1], labels y (N,) -> x_adv (N,...) in [0,1] ------------------------------

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
def own(f, x, y):
    """The paper's own attack in its test protocol (Section 5): the target is the class closest to x, the confidence
    that of f at x, at most 500 steps of length at most 0.1, each projected to [0,1].

    Returns x_adv, detached, also where it is classified as the target but did not reach the confidence; x itself
    where f is wrong at x, and where the attack does not end in its target.
    """
    probability, label = f(x).softmax(1).max(1)
    target = closest_class(f, x, y)
    right = (label == y).nonzero().squeeze(1)
    x_adv = x.detach().clone()
    x_adv[right] = attack(f, x[right], target[right], probability[right], steps=500, overshoot=0.02, max_step=0.1,
                          box=(0, 1))
    done = (label != y) | (f(x_adv).argmax(1) == target)
    return torch.where(done.view(-1, *[1] * (x.dim() - 1)), x_adv, x)


ATTACKS = {"deepfool": deepfool, "own": own}


# --- Measuring a classifier ---------------------------------------------------------------------------------------

@torch.no_grad()
def error_rate(f, x, y):
    """The share of the images x that f does not classify as y, a float in [0,1]."""
    wrong = sum((f(part).argmax(1) != label).sum() for part, label in zip(x.split(500), y.split(500)))
    return wrong.item() / len(x)


@torch.no_grad()
def measure(f, x, y, attack, label=None):
    """Attacks the images x with attack(f, x, y) -> x_adv and sums up, from the returned images alone. With a label
    it shows its progress on a terminal. A dict:

    rho      mean over the images that were fooled and are not black; 0 for images that f gets wrong by itself
    failed   images still classified as y        black     images of norm 0, left out of the mean
    reached  share of the images that f gets right, whose attacked image f is at least as sure of as of the clean one
    seconds  wall-clock time of the attack
    """
    start, parts, chunk = time.perf_counter(), [], 2000 if x.is_cuda else 250
    for some in torch.arange(len(x), device=x.device).split(chunk):
        if label and sys.stderr.isatty():
            print(f"\r{label} {some[0]}/{len(x)}\033[K", end="", file=sys.stderr, flush=True)
        parts.append(attack(f, x[some], y[some]))
    x_adv = torch.cat(parts)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - start
    black, ratio = x.flatten(1).norm(dim=1) == 0, rho(x, x_adv)
    sure, predicted = torch.cat([f(part).softmax(1) for part in x.split(500)]).max(1)
    sure_adv, predicted_adv = torch.cat([f(part).softmax(1) for part in x_adv.split(500)]).max(1)
    fooled = (predicted_adv != y) & x_adv.flatten(1).isfinite().all(1)
    return dict(rho=ratio[fooled & ~black].mean().item(), failed=(~fooled).sum().item(), black=black.sum().item(),
                seconds=seconds,
                reached=(fooled & (sure_adv >= sure))[predicted == y].float().mean().item())


# --- Checkpoints --------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """The dict in a checkpoint of train.py, on the CPU, with its settings and the weights of f at least, all finite.
    Runs no code from the file. OSError where it cannot be read, ValueError where it is no such checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = {name: checkpoint["settings"][name] for name in ("arch", "defense", "seed", "epochs", "data")}
        NETWORKS[settings["arch"]]().load_state_dict(checkpoint["f"])
        if settings["data"] not in DATA:
            raise ValueError(f"unknown data {settings['data']!r}")
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything, from the unpickler to load_state_dict
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path} is not a checkpoint of train.py, or a broken one ({type(error).__name__}: {reason})"
                         ) from None
    if not all(tensor.isfinite().all() for tensor in tensors(checkpoint)):
        raise ValueError(f"{path} holds numbers that are not finite")
    return checkpoint


def tensors(value):
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def load_checkpoint(path, device="cpu"):
    """The classifier of a checkpoint of train.py, full or weights-only, and its settings: f (in eval mode), dict, with
    "interrupted_after" its last epoch where the run did not come to its end. OSError where the file cannot be read,
    ValueError where it is no such checkpoint."""
    checkpoint = read_checkpoint(path)
    f = NETWORKS[checkpoint["settings"]["arch"]]()
    f.load_state_dict(checkpoint["f"])
    info, log = dict(checkpoint["settings"]), checkpoint.get("log")
    if log and log[-1]["epoch"] < info["epochs"]:
        info["interrupted_after"] = log[-1]["epoch"]
    return f.to(device).eval(), info


# --- The table ----------------------------------------------------------------------------------------------------

def spread(values, digits):
    """'mean' of one value, 'mean ± standard deviation' of several."""
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def print_columns(rows):
    """Prints rows of strings as aligned columns, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))).rstrip())


def print_table(results, attacks):
    """A row for each group of results, (settings, dict of figures), whose settings differ only in the seed."""
    groups = {}
    for settings, figures in results:
        key = str(sorted((name, value) for name, value in settings.items() if name != "seed"))
        groups.setdefault(key, []).append((settings, figures))
    names = ["arch", "defense", "epochs"]  # and whatever else tells the groups apart
    values = {}
    for settings, _ in results:
        for name, value in settings.items():
            values.setdefault(name, set()).add(value)
    names += [name for name in values if name not in [*names, "seed"]
              and (len(values[name]) > 1 or name == "interrupted_after")]
    header = [*names, "seeds", "test error %"]
    for name in attacks:
        header += [f"rho {name}", "failed"] + ["reached %"] * (name == "own") + ["seconds"]
    rows = [header]
    for group in groups.values():
        settings, figures = group[0][0], [figures for _, figures in group]
        row = [*(str(settings.get(name, "")) for name in names), str(len(group)),
               spread([100 * figure["test_error"] for figure in figures], 2)]
        for name in attacks:
            of = {key: [figure[name][key] for figure in figures] for key in figures[0][name]}
            row += [spread(of["rho"], 4), str(sum(of["failed"]))]
            row += [spread([100 * share for share in of["reached"]], 1)] * (name == "own")
            row += [spread(of["seconds"], 0)]
        rows.append(row)
    print_columns(rows)


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


def device_flag(text):
    """An argparse type: a device of this machine."""
    try:
        device = torch.device(text)
        if device.type in ("cpu", "cuda"):
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # unknown, not there, or a torch built without it
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected cpu{', cuda or cuda:N' * torch.cuda.is_available()}")


def add_data_flags(parser, default):
    """--data, --data-dir and --device, as train.py has them too."""
    parser.add_argument("--data", choices=DATA, default=default,
                        help="MNIST, or drawn digits that need no download")
    parser.add_argument("--data-dir", help="folder of MNIST's four files (default $MNIST_DIR, else data)")
    parser.add_argument("--device", type=device_flag, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: CUDA where there is one")


def attack_names(text):
    """An argparse type: names of ATTACKS, joined by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ATTACKS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {','.join(ATTACKS)}")
    return names


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files that train.py wrote")
    parser.add_argument("--n", type=number(int, 1, 10000),
                        help="attack the first N of a fixed permutation of the test images (default: all on CUDA, 500 "
                             "on a CPU); the test error is always over all 10,000")
    parser.add_argument("--attacks", type=attack_names, default=list(ATTACKS), help=f"default {','.join(ATTACKS)}")
    add_data_flags(parser, default=None)
    args = parser.parse_args(argv)
    try:
        loaded = [load_checkpoint(path, args.device) for path in args.checkpoints]
        runs = {str(sorted(settings.items())) for _, settings in loaded}
        if len(runs) < len(loaded):
            raise ValueError("two checkpoints are of the same run, settings and seed alike: give it once")
        trained_on = sorted({settings["data"] for _, settings in loaded})
        if not args.data and len(trained_on) > 1:
            raise ValueError(f"the checkpoints were trained on {' and '.join(trained_on)}: name one with --data")
        source = args.data or trained_on[0]
        x, y = data.load_mnist(args.data_dir)[2:] if source == "mnist" else data.stroke_digits(10000, seed=1)
    except (OSError, ValueError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    x, y = x.to(args.device), y.to(args.device)
    n = args.n or (10000 if x.is_cuda else 500)
    some = torch.randperm(10000, generator=torch.Generator().manual_seed(0))[:n].to(args.device)

    results = []
    try:
        for path, (f, settings) in zip(args.checkpoints, loaded):
            figures = {"test_error": error_rate(f, x, y)}
            for name in args.attacks:
                figures[name] = measure(f, x[some], y[some], ATTACKS[name], f"{path} {name}")
            results.append((settings, figures))
    except KeyboardInterrupt:
        print(f"\nInterrupted after {len(results)} of {len(loaded)} checkpoints.", file=sys.stderr)
        if not results:
            return 130
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print_table(results, args.attacks)
    black = max((figures[name]["black"] for _, figures in results for name in args.attacks), default=0)
    print(f"rho: mean of |x_adv - x| / |x| over {n} of {source}'s test images, 0 where f is wrong on the clean image\n"
          f"failed (over all seeds): not fooled, left out of the mean{f' like {black} black ones' if black else ''}\n"
          "reached: share that the paper's attack brought to the confidence of the clean image")
    return 0 if len(results) == len(loaded) else 130


if __name__ == "__main__":
    sys.exit(main())
