"""Trains a classifier against its adversary critic, or with one of the defenses that the paper compares it with.

    python train.py --arch lenet              the paper's run: 100 epochs, some 18 hours on one CPU core, estimated
    python train.py --arch lenet --quick      a short one, to see it train: 3 minutes on one core

Prints a line after each epoch and, last, the command that measures the network on the test set.
"""
import argparse
import csv
import dataclasses
import io
import signal
import sys
import time
from pathlib import Path

from eval import (NETWORKS, add_data_flags, deepfool, error_rate, measure, network, progress, read_checkpoint, unit,
                  use_float32)  # before torch, because eval silences torch's warning that numpy is missing

import torch
import torch.nn.functional as F
from torch import nn

import data
from advcritic import (RunningConfidence, boundaries, broadcast, closest_class, critic, l2, minimise, pick, train_step,
                       uniform_class)

BATCH = 100


# --- The other rows of Table 1: losses of f on a batch x (N,1,28,28), y (N,) --------------------------------------

def reference(f, x, y):
    """No defense: the negative log-likelihood (NLL)."""
    return F.cross_entropy(f(x), y)


def at(f, x, y, eps=0.1):
    """Adversarial training (Goodfellow, Shlens and Szegedy 2015): NLL(x) + NLL(x + eps sign grad_x NLL(x)).
    The perturbation is a constant for the gradient."""
    x = x.detach().requires_grad_()
    nll = F.cross_entropy(f(x), y)
    grad, = torch.autograd.grad(nll, x, retain_graph=True)
    return nll + F.cross_entropy(f(x.detach() + eps * grad.sign()), y)


def vat(f, x, y, eps=2.0, xi=1e-2):
    """Virtual adversarial training (Miyato et al. 2015): NLL + KL(p(x) || p(x + r)). r has the l2 length eps, along one
    power iteration from a random direction. p(x) and r are constants for the gradient. xi is 1e-2, because the
    original's 1e-6 would be lost to rounding in float32."""
    logits = f(x)
    log_p = logits.detach().log_softmax(1)

    def divergence(other):
        return F.kl_div(f(other).log_softmax(1), log_p, log_target=True, reduction="batchmean")
    x_i = (x + xi * unit(torch.randn_like(x))).requires_grad_()
    grad, = torch.autograd.grad(len(x) * divergence(x_i), x_i)  # each image's own, not its small share of the mean
    return F.cross_entropy(logits, y) + divergence(x + eps * unit(grad))


def margin(f, x, y, lam=0.1):
    """Margin maximisation (Matyasko and Chau 2017): the hinge max(0, 1 - f_y + max_{k != y} f_k), plus lam times
    max_k |grad_x (f_y - f_k)|_2^2. The class k of this maximum is chosen first, without a graph."""
    k = boundaries(f, x, y)[0].argmax(1)
    x = x.detach().requires_grad_()
    logits = f(x)
    f_y, f_rival = pick(logits, y), logits.scatter(1, y[:, None], -torch.inf).amax(1)
    grad, = torch.autograd.grad((f_y - pick(logits, k)).sum(), x, create_graph=True)
    return F.relu(1 - f_y + f_rival).mean() + lam * grad.flatten(1).square().sum(1).mean()


def pgd(f, x, y, eps=2.0, steps=10, step=0.5):
    """Beyond the paper, l2 PGD training (Madry et al. 2018): NLL(x_adv) alone. x_adv comes from normalised steps in the
    ball of radius eps around x and in [0,1], from a start that is uniform in the ball; it is a constant."""
    direction = unit(torch.randn_like(x))
    radius = eps * torch.rand(len(x), dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
    x_adv = x + broadcast(radius, x) * direction
    for _ in range(steps):
        x_i = x_adv.clamp(0, 1).requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(f(x_i), y, reduction="sum"), x_i)
        r = x_i.detach() + step * unit(grad) - x
        x_adv = x + broadcast(l2(r).clamp(max=eps), x) * unit(r)
    return F.cross_entropy(f(x_adv.clamp(0, 1)), y)


BASELINES = {"reference": reference, "at": at, "vat": vat, "margin": margin, "pgd": pgd}
TARGETS = {"closest": closest_class, "uniform": uniform_class}


# --- A run: what is trained, its schedule, its checkpoint, its loop -----------------------------------------------

@dataclasses.dataclass
class Run:
    """What a run holds. The settings say how it was started; the log has a row of figures for each epoch. D,
    confidence and adam_D belong to the critic, and are None for the other defenses."""
    settings: dict
    f: nn.Module
    adam_f: torch.optim.Optimizer
    D: nn.Module = None
    confidence: nn.Module = None
    adam_D: torch.optim.Optimizer = None
    log: list = dataclasses.field(default_factory=list)

    def parts(self):
        """By name, everything whose state_dict() a checkpoint keeps."""
        parts = {"f": self.f, "adam_f": self.adam_f, "D": self.D, "confidence": self.confidence, "adam_D": self.adam_D}
        return {name: part for name, part in parts.items() if part is not None}


def adam(net, lr, betas):
    """Adam for the weights of net, fused if torch can do that on their device."""
    try:
        return torch.optim.Adam(net.parameters(), lr=lr, betas=betas, fused=True)
    except RuntimeError:  # on a CPU before torch 2.4
        return torch.optim.Adam(net.parameters(), lr=lr, betas=betas)


def start(settings, device):
    """A new run. Adam as in Section 5 for the critic. For the other defenses the paper says only "Adam"; 1e-3 is from
    the authors' earlier code."""
    torch.manual_seed(settings["seed"])
    f = network(settings["arch"], device)
    if settings["defense"] != "critic":
        return Run(settings, f, adam(f, 1e-3, (0.9, 0.999)))
    D, confidence = critic().to(device), RunningConfidence(10).to(device)
    return Run(settings, f, adam(f, 5e-4, (0.5, 0.999)), D, confidence, adam(D, 1e-3, (0.5, 0.999)))


def step(run, epoch, x, y):
    """One training step of the run on a batch x (N,1,28,28) in [0,1], y (N,). Returns a dict of detached scalars."""
    settings = run.settings
    if settings["defense"] != "critic":
        loss = BASELINES[settings["defense"]](run.f, x, y)
        minimise(loss, run.adam_f)
        return {"loss": loss.detach()}
    if epoch == 0:  # plain NLL, to fill the running confidence (Section 5: "pretrain the classifier f for 1 epoch")
        logits = run.f(x)
        run.confidence.update(logits)
        nll = F.cross_entropy(logits, y)
        minimise(nll, run.adam_f)
        return {"nll": nll.detach()}
    return train_step(run.f, run.D, run.confidence, run.adam_f, run.adam_D, x, y, settings["lam"],
                      settings["lambda_rec"], settings["lambda_grad"], settings["attack_steps"],
                      TARGETS[settings["target"]])


def set_learning_rates(run, epoch):
    """The critic's are halved after 40% and 80% of the epochs (Section 5: after 40 and 80 of 100). Those of the other
    defenses are multiplied by 0.95^(100 / E) after each of E epochs; the authors' earlier code has 0.95 for E = 100."""
    epochs = run.settings["epochs"]
    if run.settings["defense"] == "critic":
        factor = 0.5 ** ((epoch > round(0.4 * epochs)) + (epoch > round(0.8 * epochs)))
    else:
        factor = 0.95 ** (100 / epochs * (epoch - 1))
    for optimizer in filter(None, (run.adam_f, run.adam_D)):
        optimizer.param_groups[0]["lr"] = factor * optimizer.defaults["lr"]


def save(run, out):
    """Writes the checkpoint, and the log that it holds as CSV beside it. OSError if that is not possible."""
    checkpoint = {"settings": run.settings, "log": run.log, "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        checkpoint["random_cuda"] = torch.cuda.get_rng_state()
    checkpoint.update({name: part.state_dict() for name, part in run.parts().items()})
    content, text = io.BytesIO(), io.StringIO()
    torch.save(checkpoint, content)
    data.replace(out, content.getvalue())
    if run.log:
        table = csv.DictWriter(text, run.log[-1], lineterminator="\n")
        table.writeheader()
        table.writerows(run.log)
        data.replace(out.with_suffix(".csv"), text.getvalue().encode())


def restore(run, out):
    """Takes the run to where its checkpoint was written. OSError or ValueError if that is not possible."""
    checkpoint = read_checkpoint(out)
    differ = [f"{name} {value}" for name, value in checkpoint["settings"].items() if run.settings.get(name) != value]
    if differ:
        raise ValueError(f"{out} was trained with {', '.join(differ)}: give the same flags, or another --out")
    if not {"log", "random", *run.parts()} <= set(checkpoint):
        raise ValueError(f"{out} holds weights alone: it cannot be resumed")
    for name, part in run.parts().items():
        if name.startswith("adam"):  # learning rates are set anew, and whether Adam is fused is this machine's matter
            checkpoint[name]["param_groups"] = part.state_dict()["param_groups"]
        part.load_state_dict(checkpoint[name])
    run.log = checkpoint["log"]
    torch.set_rng_state(checkpoint["random"])
    if torch.cuda.is_available() and "random_cuda" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["random_cuda"])


def train_epoch(run, x, y, epoch):
    """One pass over x and y in whole batches of a random order. Returns the means of what step returns, as floats.
    FloatingPointError if a loss or a weight is not finite."""
    order = torch.randperm(len(x), device=x.device)[:len(x) // BATCH * BATCH].view(-1, BATCH)
    rows, began = [], time.perf_counter()
    for i, batch in enumerate(order):
        progress(f"epoch {epoch}: step", i, len(order), began)
        losses = step(run, epoch, x[batch], y[batch])
        rows.append(torch.stack(list(losses.values())))  # stays on the device, where it is read once an epoch
    progress()
    rows = torch.stack(rows)  # (steps, losses)
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise FloatingPointError(f"the loss is not finite in step {bad.int().argmax() + 1} of epoch {epoch}")
    if not all(p.isfinite().all() for net in (run.f, run.D) if net is not None for p in net.parameters()):
        raise FloatingPointError(f"a weight is not finite after epoch {epoch}")
    return dict(zip(losses, rows.mean(0).tolist()))


def train(run, out, x, y, x_val, y_val):
    """Trains the run to its last epoch. After each epoch it writes the checkpoint and its log, and prints a line."""
    epochs = run.settings["epochs"]
    first, losses = 1, ["loss"]
    if run.settings["defense"] == "critic":
        first, losses = 0, ["nll", "fool", "cycle", "critic", "success"]  # epoch 0 is the pretraining
    columns = ["epoch", "seconds", *losses, "val_error", "deepfool"]
    print("".join(f"{name:>10}" for name in [*columns, "left"]), flush=True)
    for epoch in range(first + len(run.log), epochs + 1):
        began = time.perf_counter()
        set_learning_rates(run, epoch)
        row = {"epoch": epoch, **train_epoch(run, x, y, epoch)}
        row["val_error"] = error_rate(run.f, x_val, y_val)
        found = measure(run.f, x_val[:100], y_val[:100], deepfool)
        row["deepfool"] = found["rho"]
        row["seconds"] = round(time.perf_counter() - began, 1)
        run.log.append(row)
        save(run, out)
        cells = [f"{row[name]:.4g}" if name in row else "" for name in columns]
        cells.append(f"{row['seconds'] * (epochs - epoch) / 60:.1f} min" if epoch else "")  # the pretraining is faster
        if row["val_error"] > 0.5:
            cells.append("  COLLAPSED")
        if found["failed"]:
            cells.append(f"  DeepFool failed on {found['failed']}")
        print("".join(f"{cell:>10}" for cell in cells), flush=True)


# --- Command line -------------------------------------------------------------------------------------------------

def parse_flags(argv):
    """The command line as argparse has it, and the settings of the run, a dict that its checkpoint keeps."""
    parser = argparse.ArgumentParser(description="Trains a classifier with one of the defenses.", allow_abbrev=False)
    parser.add_argument("--arch", choices=list(NETWORKS), default="lenet", help="the classifier (default lenet)")
    parser.add_argument("--defense", choices=["critic", *BASELINES], default="critic", help="critic: the paper's "
                        "(default); reference: none; at, vat, margin: those that the paper compares it with; pgd: "
                        "adversarial training in l2, beyond the paper")
    parser.add_argument("--epochs", type=int, help="passes over the training images, not counting the critic's first "
                        "on plain NLL (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the noise (default 0)")
    parser.add_argument("--train-images", type=int, help="how many to train on (default 50000)")
    add_data_flags(parser, default="mnist")
    parser.add_argument("--out", type=Path, metavar="FILE.pt", help="the checkpoint; its log is FILE.csv beside it "
                        "(default runs/ARCH-DEFENSE[-quick][-drawn]-SEED.pt)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out; give the same flags")
    parser.add_argument("--quick", action="store_true", help="minutes: 2 epochs of 6,000 training images")
    paper = parser.add_argument_group("constants of the paper, for --defense critic")
    paper.add_argument("--lam", type=float, help="weight of fooling the critic in the classifier's loss, Eq. 5 "
                       "(default 0.1 for lenet, 0.5 for mlp)")
    paper.add_argument("--lambda-rec", type=float, help="weight of the cycle term, Eq. 6 (default 0.01)")
    paper.add_argument("--lambda-grad", type=float, help="weight of the gradient norm penalty, Section 4 (default 10)")
    paper.add_argument("--attack-steps", type=int, help="steps of the attack, Algorithm 1 (default 5)")
    paper.add_argument("--target", choices=list(TARGETS), help="the class that the attack aims at: the one with the "
                       "closest boundary, or any other at random (default closest)")
    args = parser.parse_args(argv)

    settings = {"arch": args.arch, "defense": args.defense, "seed": args.seed, "data": args.data,
                "epochs": 2 if args.quick else 100, "train_images": 6000 if args.quick else 50000}
    if args.defense == "critic":
        settings.update(lam={"lenet": 0.1, "mlp": 0.5}[args.arch], lambda_rec=0.01, lambda_grad=10.0, attack_steps=5,
                        target="closest")
    for name in ("epochs", "train_images", "lam", "lambda_rec", "lambda_grad", "attack_steps", "target"):
        given = getattr(args, name)
        if given is not None and name not in settings:
            parser.error(f"--{name.replace('_', '-')} is for --defense critic, not for {args.defense}")
        if given is not None:
            settings[name] = given
    for name, low, high in (("epochs", 1, 10**6), ("train_images", BATCH, 50000), ("attack_steps", 1, 1000),
                            ("seed", 0, 2**63 - 1), ("lam", 0, 1e6), ("lambda_rec", 0, 1e6), ("lambda_grad", 0, 1e6)):
        if not low <= settings.get(name, low) <= high:
            parser.error(f"--{name.replace('_', '-')}: {settings[name]}, expected {low} to {high}")
    if args.out is None:
        kind = f"{args.defense}{'-quick' if args.quick else ''}{'-drawn' if args.data == 'drawn' else ''}"
        args.out = Path("runs", f"{args.arch}-{kind}-{args.seed}.pt")
    if args.out.suffix != ".pt":
        parser.error(f"--out: {args.out}, expected a name that ends in .pt")
    return args, settings


def run_command(args, settings):
    """Trains, or goes on with, the run that the flags describe. OSError, ValueError or FloatingPointError."""
    use_float32()
    run = start(settings, args.device)
    if args.resume:
        if not args.out.exists():
            raise FileNotFoundError(f"{args.out} is not there: --arch, --defense, --quick, --data and --seed name it")
        restore(run, args.out)
    else:
        for path in (args.out, args.out.with_suffix(".csv")):
            if path.exists():
                raise FileExistsError(f"{path} is there already: --resume continues a run, --out names another file")
    x, y = (part.to(args.device) for part in data.load(args.data, args.data_dir)[:2])
    held_out, used = slice(10000), slice(10000, 10000 + settings["train_images"])  # held out as in the authors' code
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save(run, args.out)  # so that a file that cannot be written is known now, and not after the first epoch
    machine = torch.cuda.get_device_name() if x.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {args.device} ({machine})")
    print(" ".join(f"{name}={value}" for name, value in settings.items()))
    if args.resume:
        print(f"Resumed after epoch {run.log[-1]['epoch'] if run.log else 'none'} of {settings['epochs']}")
    print(f"{args.out} and its .csv are written after each epoch", flush=True)
    train(run, args.out, x[used], y[used], x[held_out], y[held_out])
    print(f"Done. On the test set: python eval.py {args.out}")


def main(argv=None):
    """The command line; returns the exit status."""
    args, settings = parse_flags(argv)
    try:
        run_command(args, settings)
        return 0
    except KeyboardInterrupt:
        has_log = args.out.with_suffix(".csv").exists()
        hint = "--resume goes on after the last whole epoch" if has_log else "no epoch is finished yet"
        print(f"\ntrain.py: interrupted: {hint}", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        progress()
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
