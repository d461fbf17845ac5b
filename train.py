"""Train a classifier against its adversary critic, or one of the defenses that the paper compares it with.

    python train.py --arch lenet                          the paper's run: 100 epochs, 50,000 training steps of MNIST
    python train.py --arch lenet --quick                  180 + 360 steps, 3 to 7 minutes on two CPU cores
    python train.py --arch lenet --quick --data drawn     the same on drawn digits, without a download

Prints a line per epoch and, last, the command that measures the network on the test set.
"""
import argparse
import csv
import dataclasses
import io
import shlex
import signal
import sys
import time
from pathlib import Path

from eval import (NETWORKS, add_data_flags, deepfool, error_rate, l2, measure, network, number, own_and_others,
                  read_checkpoint, reason, set_up, unit)  # before torch: it filters what torch says without numpy

import torch
import torch.nn.functional as F
from torch import nn

import data
from advcritic import (RunningConfidence, boundaries, checked, closest_class, critic, leaf, minimise, per_image, pick,
                       train_step, uniform_class)

BATCH = 100


# --- The other rows of Table 1: losses of f on a batch x (N,1,28,28), y (N,) --------------------------------------

def reference(f, x, y):
    """No defense: the negative log-likelihood (NLL)."""
    return F.cross_entropy(checked(f, x, y=y), y)


def at(f, x, y, eps=0.1):
    """Adversarial training (Goodfellow, Shlens and Szegedy 2015): NLL(x) + NLL(x + eps sign grad_x NLL(x)).
    The perturbation is a constant for the gradient."""
    x = leaf(x)
    nll = F.cross_entropy(checked(f, x, y=y), y)
    grad, = torch.autograd.grad(nll, x, retain_graph=True)
    return nll + F.cross_entropy(f(x.detach() + eps * grad.sign()), y)


def vat(f, x, y, eps=2.0, xi=1e-2):
    """Virtual adversarial training (Miyato et al. 2015): NLL(x) + KL(p(x) || p(x + r)), r of l2 length eps along one
    power iteration from a random direction. p(x) and r are constants for the gradient. The iteration's step xi is
    larger than the reference's 1e-6, which float32 loses."""
    logits = checked(f, x, y=y)
    log_p = logits.detach().log_softmax(1)

    def divergence(other):
        return F.kl_div(f(other).log_softmax(1), log_p, log_target=True, reduction="batchmean")
    x_i = (x + xi * unit(torch.randn_like(x))).requires_grad_()
    grad, = torch.autograd.grad(len(x) * divergence(x_i), x_i)  # each image's own, not its share of a mean
    return F.cross_entropy(logits, y) + divergence(x + eps * unit(grad))


def margin(f, x, y, lam=0.1):
    """Margin maximisation (Matyasko and Chau 2017): the hinge max(0, 1 - f_y + max_{k != y} f_k), and lam times
    max_k |grad_x (f_y - f_k)|_2^2. The class of the second max is picked first; its difference alone is differentiated.
    """
    k = boundaries(f, x, y)[1].argmax(1)
    x = leaf(x)
    logits = f(x)
    f_y, others = own_and_others(logits, y)
    grad, = torch.autograd.grad((f_y - pick(logits, k)).sum(), x, create_graph=True)
    return F.relu(1 - f_y + others.max(1).values).mean() + lam * grad.flatten(1).square().sum(1).mean()


def pgd(f, x, y, eps=2.0, steps=10, step=0.5):
    """Beyond the paper, l2 PGD training (Madry et al. 2018): NLL(x_adv) alone, x_adv after normalised steps from a
    start uniform in the ball of radius eps around x, in the ball and in [0,1]; a constant for the gradient."""
    x = leaf(x).detach()
    direction = unit(torch.randn_like(x))
    radius = eps * torch.rand(len(x), dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
    x_adv = x + per_image(radius, x) * direction
    for _ in range(steps):
        x_i = x_adv.clamp(0, 1).requires_grad_()  # moves no pixel away from x: it stays in the ball
        grad, = torch.autograd.grad(F.cross_entropy(checked(f, x_i, y=y), y, reduction="sum"), x_i)
        r = x_i.detach() + step * unit(grad) - x
        x_adv = x + per_image(l2(r).clamp(max=eps), r) * unit(r)
    return F.cross_entropy(f(x_adv.clamp(0, 1)), y)


BASELINES = {"reference": reference, "at": at, "vat": vat, "margin": margin, "pgd": pgd}


# --- A run: what is trained, its schedule, its checkpoint ---------------------------------------------------------

@dataclasses.dataclass
class Run:
    """What a run holds. settings say how it was started, log has a row of figures for each epoch; D, confidence and
    adam_D are those of the critic, None for the other defenses."""
    settings: dict
    f: nn.Module
    adam_f: torch.optim.Optimizer
    D: nn.Module = None
    confidence: nn.Module = None
    adam_D: torch.optim.Optimizer = None
    log: list = dataclasses.field(default_factory=list)

    def parts(self):
        """By name, everything whose state_dict() a checkpoint keeps beside settings and log."""
        parts = {"f": self.f, "adam_f": self.adam_f, "D": self.D, "confidence": self.confidence, "adam_D": self.adam_D}
        return {name: part for name, part in parts.items() if part is not None}


def adam(net, lr, betas=(0.9, 0.999)):
    """Adam for the weights of net, fused where torch has that for their device (for a CPU since torch 2.4)."""
    try:
        return torch.optim.Adam(net.parameters(), lr=lr, betas=betas, fused=True)
    except RuntimeError:
        return torch.optim.Adam(net.parameters(), lr=lr, betas=betas)


def start(settings, device):
    """A fresh run, with Adam: the critic's learning rates as in Section 5, which names none for the other defenses."""
    torch.manual_seed(settings["seed"])
    f = network(settings["arch"], device)
    if settings["defense"] != "critic":
        return Run(settings, f, adam(f, lr=1e-3))
    with torch.device("cpu"):  # and float32, whatever torch's defaults are
        D, confidence = (net.to(device, torch.float32) for net in (critic(), RunningConfidence(10)))
    return Run(settings, f, adam(f, lr=5e-4, betas=(0.5, 0.999)), D, confidence, adam(D, lr=1e-3, betas=(0.5, 0.999)))


TARGETS = {"closest": closest_class, "uniform": uniform_class}


def step(run, epoch, x, y):
    """One training step of run on a batch x (N,1,28,28) in [0,1], y (N,); a dict of detached scalars."""
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
    return train_step(run.f, run.D, run.confidence, run.adam_f, run.adam_D, x, y, lam=settings["lam"],
                      lambda_rec=settings["lambda_rec"], lambda_grad=settings["lambda_grad"],
                      steps=settings["attack_steps"], choose_target=TARGETS[settings["target"]])


def set_learning_rates(run, epoch):
    """Section 5: halved after epochs 40 and 80 of 100, of another length E after round(0.4 E) and round(0.8 E). The
    baselines: times 0.95^(100 / E) after each epoch."""
    epochs = run.settings["epochs"]
    if run.settings["defense"] == "critic":
        halved_after = [end for end in (round(0.4 * epochs), round(0.8 * epochs)) if end < epoch]
        factor = 0.5 ** len(halved_after)
    else:
        factor = 0.95 ** (100 / epochs * (epoch - 1))
    for optimizer in filter(None, (run.adam_f, run.adam_D)):
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor


COLUMNS = {"loss": ".3f", "nll": ".3f", "fool": ".3f", "cycle": ".3f", "critic": ".3f", "success": ".1%",
           "val_error": ".2%", "rho": ".4f"}  # of the log, and how the screen shows them


def save(run, out, new=False):
    """The one place where a run is written: its checkpoint, and the log that is in it as CSV, whole, so that no kill
    loses or doubles a row. OSError, also where a new one is there already."""
    checkpoint = {"settings": run.settings, "log": run.log, "random": torch.get_rng_state()}
    checkpoint.update({name: part.state_dict() for name, part in run.parts().items()})
    if next(run.f.parameters()).is_cuda:
        checkpoint["random_cuda"] = torch.cuda.get_rng_state()
    content = io.BytesIO()
    torch.save(checkpoint, content)
    data.replace(out, content.getbuffer(), new)
    text = io.StringIO()
    table = csv.DictWriter(text, ["epoch", "seconds", *COLUMNS])
    table.writeheader()
    table.writerows(run.log)
    try:
        data.replace(out.with_suffix(".csv"), text.getvalue().encode())
    except OSError as error:  # as while a spreadsheet has it open
        print(f"train.py: warning: the log could not be written, the next epoch tries again: {error}", file=sys.stderr)


def restore(run, out):
    """Puts run where its checkpoint left it. OSError where there is none, ValueError where it is another run's."""
    checkpoint = read_checkpoint(out)
    theirs, ours = checkpoint["settings"], run.settings
    differ = [f"{name} {theirs.get(name)} (now {ours.get(name)})" for name in {**theirs, **ours}
              if theirs.get(name) != ours.get(name)]
    if differ:
        raise ValueError(f"{out} was trained with {', '.join(differ)}: give the same flags, or another --out")
    try:
        for name, part in run.parts().items():
            part.load_state_dict(checkpoint[name])
        run.log = checkpoint["log"]
        torch.set_rng_state(checkpoint["random"])
        if next(run.f.parameters()).is_cuda and "random_cuda" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["random_cuda"])
    except Exception as error:  # load_state_dict has many kinds of errors for what is not its own
        raise ValueError(f"{out} is not the whole state of a run, it cannot be resumed ({reason(error)})") from None


# --- The loop -----------------------------------------------------------------------------------------------------

def train_epoch(run, x, y, epoch, to_go=0):
    """One pass over x (bytes), y in whole batches of a random order; the means of what step returns, as floats. to_go:
    say how long so many epochs will take, once the first steps are done. FloatingPointError ends it."""
    order = torch.randperm(len(x), device=x.device)[:len(x) // BATCH * BATCH].view(-1, BATCH)
    rows, times = [], []
    for i, batch in enumerate(order, 1):
        parts = step(run, epoch, x[batch].float() / 255, y[batch])
        rows.append(torch.stack(list(parts.values())))  # stays on the device: one read an epoch
        if to_go and i in (5, 20):
            rows[-1].tolist()  # the device has computed it
            times.append(time.perf_counter())
        if to_go and i == 20:
            announce((times[1] - times[0]) / 15, len(order) * to_go)
    rows = torch.stack(rows)                            # (steps, parts)
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise FloatingPointError(f"the loss is not finite since step {bad.int().argmax() + 1} of epoch {epoch}")
    for net in (run.f, run.D):
        if net is not None and not all(weight.isfinite().all() for weight in net.parameters()):
            raise FloatingPointError(f"a weight is not finite after epoch {epoch}")
    return dict(zip(parts, rows.mean(0).tolist()))


def announce(seconds, steps):
    """Says how long so many steps of so many seconds will take."""
    hint = "; --quick takes minutes" if seconds * steps > 3600 else ""
    print(f"      {1000 * seconds:.0f} ms a step, so about {clock(seconds * steps)} to go "
          f"(hours:minutes:seconds){hint}", flush=True)


def clock(seconds):
    """Hours, minutes and seconds, '1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def train(run, out, x, y, x_val, y_val):
    """Trains run to its last epoch; after each one line on the screen, and the checkpoint and its log on disk."""
    epochs = run.settings["epochs"]
    if run.D is None:
        begin = len(run.log) + 1
        columns = ["loss", "val_error", "rho"]
    else:
        begin = len(run.log)  # the critic's epoch 0 is that of pretraining
        columns = ["nll", "fool", "cycle", "critic", "success", "val_error", "rho"]
    layout = "{:>5} {:>8} {:>8}" + " {:>9}" * len(columns)
    print(layout.format("epoch", "time", "left", *columns), flush=True)
    x_val = x_val.float() / 255
    for epoch in range(begin, epochs + 1):
        began = time.perf_counter()
        set_learning_rates(run, epoch)
        row = train_epoch(run, x, y, epoch, to_go=epochs - epoch + 1 if epoch == max(begin, 1) else 0)
        row["val_error"] = error_rate(run.f, x_val, y_val)
        attacked = measure(run.f, x_val[:100], y_val[:100], deepfool)
        row["rho"] = attacked["rho"]
        seconds = time.perf_counter() - began
        run.log.append({"epoch": epoch, "seconds": round(seconds, 1), **row})
        save(run, out)
        left = clock(seconds * (epochs - epoch)) if epoch else ""
        cells = [format(row[name], COLUMNS[name]) if name in row else "" for name in columns]
        line = layout.format(epoch, clock(seconds), left, *cells)
        if attacked["failed"]:
            line += f"  rho without {attacked['failed']} images that were not fooled"
        if row.get("success", 1) < 0.5 or row["val_error"] > 0.5:
            line += "  COLLAPSED, see success and val_error"
        print(line.rstrip(), flush=True)


# --- Command line -------------------------------------------------------------------------------------------------

def parse_flags(argv):
    """The command line as argparse has it, and the settings of the run, a dict that its checkpoint keeps."""
    parser = argparse.ArgumentParser(description="Trains a classifier against its adversary critic, or one of the "
                                     "defenses that the paper compares it with.")
    parser.add_argument("--arch", choices=list(NETWORKS), default="lenet", help="the classifier: LeNet-5, or an MLP of "
                        "three hidden layers of 1200 (default lenet)")
    parser.add_argument("--defense", choices=["critic", *BASELINES], default="critic", help="critic: the paper's; "
                        "reference: none; at: adversarial training on one step of the gradient's sign; vat: virtual "
                        "adversarial training; margin: a large margin around the data; pgd: adversarial training on "
                        "ten steps in l2, beyond the paper (default critic)")
    parser.add_argument("--epochs", type=number(int, 1), help="passes over the training images, not counting the "
                        "critic's first on plain NLL (default 100)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the weights, the order of the "
                        "batches, the noise and the targets (default 0)")
    parser.add_argument("--train-images", type=number(int, BATCH, 50000), help="how many to train on (default 50000)")
    add_data_flags(parser, default="mnist")
    parser.add_argument("--out", type=Path, metavar="FILE.pt", help="the checkpoint, its log is FILE.csv beside "
                        "it (default runs/ARCH-DEFENSE[-quick][-drawn]-SEED.pt)")
    parser.add_argument("--resume", action="store_true", help="continue the run that --out holds; give the same flags")
    parser.add_argument("--quick", action="store_true", help="minutes on a CPU: 18000 training images, 2 epochs after "
                        "that of plain NLL (the other defenses: 3)")
    paper = parser.add_argument_group("constants of the paper, for --defense critic")
    paper.add_argument("--lam", type=number(float, 0), help="weight of fooling the critic in the classifier's loss, "
                       "Eq. 5 (default 0.1 for lenet, 0.5 for mlp)")
    paper.add_argument("--lambda-rec", type=number(float, 0), help="weight of the cycle term, which pulls the attack "
                       "back from x_adv to the image it came from, Eq. 6 (default 0.01)")
    paper.add_argument("--lambda-grad", type=number(float, 0), help="weight of the penalty that keeps the critic's "
                       "gradient at length 1, Section 4 (default 10)")
    paper.add_argument("--attack-steps", type=number(int, 1), help="steps of the attack, Algorithm 1 (default 5)")
    paper.add_argument("--target", choices=list(TARGETS), help="the class that the attack aims at: the one with the "
                       "closest boundary, or any other at random (default closest)")
    args = parser.parse_args(argv)

    is_critic = args.defense == "critic"
    settings = {"arch": args.arch, "defense": args.defense, "seed": args.seed, "data": args.data,
                "epochs": 100, "train_images": 50000}
    if args.quick:
        settings.update(epochs=2 if is_critic else 3, train_images=18000)
    if is_critic:
        settings.update(lam=0.1 if args.arch == "lenet" else 0.5, lambda_rec=0.01, lambda_grad=10.0, attack_steps=5,
                        target="closest")
    for name in ("epochs", "train_images", "lam", "lambda_rec", "lambda_grad", "attack_steps", "target"):
        given = getattr(args, name)
        if given is not None and name not in settings:
            parser.error(f"--{name.replace('_', '-')} is a constant of --defense critic, not of {args.defense}")
        if given is not None:
            settings[name] = given
    if args.out is None:
        quick = "-quick" if args.quick else ""
        drawn = "-drawn" if args.data == "drawn" else ""
        args.out = Path("runs", f"{args.arch}-{args.defense}{quick}{drawn}-{args.seed}.pt")
    if args.out.suffix != ".pt":
        parser.error(f"--out {args.out}: expected a name that ends in .pt")
    return args, settings


def load(source, data_dir, train_images, device):
    """Training and validation sets on the device; the first 10,000 images are held out (as the authors' code does).
    The images are bytes, 0 to 255, a quarter of the memory."""
    n = 10000 + train_images
    x, y = data.load_mnist(data_dir)[:2] if source == "mnist" else data.drawn_digits(n, seed=0)
    x, y = x[:n].mul(255).round_().byte().to(device), y[:n].to(device)
    return x[10000:], y[10000:], x[:10000], y[:10000]


def eval_command(args):
    """The command that measures the network, to be pasted where this one was typed."""
    script = Path(__file__).with_name("eval.py")
    if script.parent == Path.cwd():
        script = script.name
    words = [sys.orig_argv[0], str(script), str(args.out)]
    if args.data_dir:
        words += ["--data-dir", str(args.data_dir)]
    return shlex.join(words)


def main(argv=None):
    """The command line; returns the exit status."""
    args, settings = parse_flags(argv)
    set_up()
    log = args.out.with_suffix(".csv")
    taken = "{} is there already and would be overwritten: --resume continues a checkpoint, --out names another"
    try:
        run = start(settings, args.device)
        if args.resume:
            restore(run, args.out)
        else:
            for file in (args.out, log):
                if file.exists():
                    raise FileExistsError(taken.format(file))
        sets = load(args.data, args.data_dir, settings["train_images"], args.device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        try:  # now, and not after hours: whether it can be written, and is ours
            save(run, args.out, new=not args.resume)
        except FileExistsError:  # of two that began at once this is the second
            raise FileExistsError(taken.format(args.out)) from None
        machine = torch.cuda.get_device_name(args.device) if sets[0].is_cuda else f"{torch.get_num_threads()} threads"
        print(f"torch {torch.__version__} on {args.device} ({machine})")
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{args.out} and {log} are written after each epoch", flush=True)
        train(run, args.out, *sets)
        print(f"Done. On the test set: {eval_command(args)}")
        return 0
    except KeyboardInterrupt:
        kept = f"; {args.out} keeps the last whole epoch, --resume goes on after it" if args.out.exists() else ""
        print(f"\ntrain.py: interrupted{kept}", file=sys.stderr)
        return 130
    except FloatingPointError as error:  # --resume would come to the same step
        print(f"train.py: error: {error}; {args.out} keeps the last whole epoch", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
