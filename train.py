"""Train a classifier against its adversary critic, or one of the defenses that the paper compares it with.

    python train.py --arch lenet                          the paper's run: 100 epochs, 50,000 training steps of MNIST
    python train.py --arch lenet --quick                  360 steps, 3 min 14 s on two CPU cores
    python train.py --arch lenet --quick --data strokes   the same on drawn digits, without a download

Prints a line per epoch and, last, the command that measures the network on the test set.
"""
import argparse
import csv
import datetime
import io
import itertools
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import time
import types
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's only complaint where numpy is not

import torch
import torch.nn.functional as F

import data
from advcritic import RunningConfidence, attack, boundaries, classifier_loss, closest_class, critic, critic_loss
from eval import (NETWORKS, add_data_flags, deepfool, error_rate, measure, network, number, per_image, read_checkpoint,
                  unit)

BATCH = 100


# --- The paper's defense: one training step -----------------------------------------------------------------------

def minimise(loss, player, optimizer):
    """One step of optimizer on player's parameters; the other player gets no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=list(player.parameters()))
    optimizer.step()


def choose_target(run, x, logits):
    """The attack's target for each image: a class other than the predicted one, the closest or any (Section 4)."""
    predicted, num_classes = logits.argmax(1), logits.shape[1]
    if run.settings["target"] == "closest":
        return closest_class(run.f, x, predicted)
    return (predicted + torch.randint_like(predicted, 1, num_classes)) % num_classes


def critic_step(run, x, y):
    """Alternating minimisation of Eqs. 4 and 5 on a batch x (N,1,28,28), y (N,); a dict of detached scalars."""
    f, D, s = run.f, run.D, run.settings
    with torch.no_grad():
        logits = f(x)
    run.confidence.update(logits)
    target = choose_target(run, x, logits)
    # The attack is computed once. The critic sees its images, the classifier also differentiates through it.
    x_adv = attack(f, x, target, run.confidence.mean[target], s["attack_steps"], create_graph=True)
    with torch.no_grad():
        y_adv = f(x_adv).argmax(1)

    # Critic, Eq. 4: maximise log D_y(x) + log(1 - D_k(x_adv)), with the gradient norm penalty.
    loss_D = critic_loss(D, x, y, x_adv, y_adv, s["lambda_grad"])
    minimise(loss_D, D, run.adam_D)

    # Classifier, Eq. 5 + Eq. 6: minimise NLL - lam log D_k(x_adv) + lambda_rec |A_f(x_adv) - x|^2.
    loss_f, parts = classifier_loss(f, D, x, y, x_adv, s["lam"], s["lambda_rec"], s["attack_steps"])
    minimise(loss_f, f, run.adam_f)
    return {**parts, "critic": loss_D.detach()}


def pretrain_step(run, x, y):
    """Row 0: plain NLL, to fill the running confidence (Section 5: "pretrain the classifier f for 1 epoch")."""
    logits = run.f(x)
    run.confidence.update(logits)
    loss = F.cross_entropy(logits, y)
    minimise(loss, run.f, run.adam_f)
    return {"nll": loss.detach()}


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
    """Virtual adversarial training (Miyato et al. 2015): NLL(x) + KL(p(x) || p(x + r)), r of l2 length eps along one
    power iteration from a random direction. p(x) and r are constants for the gradient. The iteration's step xi is
    larger than the reference's 1e-6, which float32 loses."""
    logits = f(x)
    log_p = logits.detach().log_softmax(1)

    def divergence(x):
        return F.kl_div(f(x).log_softmax(1), log_p, log_target=True, reduction="batchmean")
    x_i = (x + xi * unit(torch.randn_like(x))).requires_grad_()
    grad, = torch.autograd.grad(len(x) * divergence(x_i), x_i)  # each image's own, not its share of a mean
    return F.cross_entropy(logits, y) + divergence(x + eps * unit(grad))


def margin(f, x, y, lam=0.1):
    """Margin maximisation (Matyasko and Chau 2017): the hinge max(0, 1 - f_y + max_{k != y} f_k), and lam times
    max_k |grad_x (f_y - f_k)|_2^2. The second k is picked as a constant; its difference alone is differentiated."""
    k = boundaries(f, x, y)[1].norm(dim=2).argmax(1)
    x = x.detach().requires_grad_()
    logits = f(x)
    f_y, f_k = (logits.gather(1, label[:, None]).squeeze(1) for label in (y, k))
    grad, = torch.autograd.grad((f_y - f_k).sum(), x, create_graph=True)
    rival = logits.scatter(1, y[:, None], -math.inf).max(1).values
    return F.relu(1 - f_y + rival).mean() + lam * grad.flatten(1).square().sum(1).mean()


def pgd(f, x, y, eps=2.0, steps=10, step=0.5):
    """Beyond the paper, l2 PGD training (Madry et al. 2018): NLL(x_adv) alone, x_adv after normalised steps from a
    start uniform in the ball of radius eps around x, in the ball and in [0,1]; a constant for the gradient."""
    x_adv = x + eps * unit(torch.randn_like(x)) * torch.rand_like(x[:, :1, :1, :1]) ** (1 / x[0].numel())
    for _ in range(steps):
        x_i = x_adv.clamp(0, 1).requires_grad_()  # towards x, so it stays in the ball
        grad, = torch.autograd.grad(F.cross_entropy(f(x_i), y, reduction="sum"), x_i)
        r = x_i.detach() + step * unit(grad) - x
        x_adv = x + unit(r) * per_image(r.flatten(1).norm(dim=1).clamp(max=eps), r)
    return F.cross_entropy(f(x_adv.clamp(0, 1)), y)


BASELINES = {"reference": reference, "at": at, "vat": vat, "margin": margin, "pgd": pgd}


def baseline_step(run, x, y):
    """One step on the loss of a baseline; a dict of the detached loss."""
    loss = BASELINES[run.settings["defense"]](run.f, x, y)
    minimise(loss, run.f, run.adam_f)
    return {"loss": loss.detach()}


# --- A run: what is trained, its schedule, its checkpoint ---------------------------------------------------------

def start(settings, device):
    """A fresh run: its settings, its log, and the networks, optimisers and confidences that a checkpoint holds."""
    torch.manual_seed(settings["seed"])
    run = types.SimpleNamespace(settings=settings, log=[], f=network(settings["arch"], device))
    if settings["defense"] == "critic":
        run.D, run.confidence = critic().to(device), RunningConfidence(10).to(device)
        run.adam_f = torch.optim.Adam(run.f.parameters(), lr=5e-4, betas=(0.5, 0.999), fused=True)
        run.adam_D = torch.optim.Adam(run.D.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    else:
        run.adam_f = torch.optim.Adam(run.f.parameters(), lr=1e-3, fused=True)
    return run


def set_learning_rates(run, epoch):
    """Section 5: halved after epochs 40 and 80 of 100. The baselines: times 0.95 after each of 100 epochs. Runs of
    another length end with the same rate."""
    epochs = run.settings["epochs"]
    halvings = (epoch > round(0.4 * epochs)) + (epoch > round(0.8 * epochs))
    factor = 0.5 ** halvings if run.settings["defense"] == "critic" else 0.95 ** (100 / epochs * (epoch - 1))
    for adam in (getattr(run, name) for name in ("adam_f", "adam_D") if hasattr(run, name)):
        for group in adam.param_groups:
            group["lr"] = adam.defaults["lr"] * factor


def save(run, path):
    """The one place where a run is written: its checkpoint, and its log beside it."""
    checkpoint = {name: part if name in ("settings", "log") else part.state_dict() for name, part in vars(run).items()}
    checkpoint["random"] = torch.get_rng_state()
    if (device := next(run.f.parameters()).device).type == "cuda":
        checkpoint["random_cuda"] = torch.cuda.get_rng_state(device)
    content = io.BytesIO()
    torch.save(checkpoint, content)
    replace(path, content.getbuffer())
    save_log(run, path)


def save_log(run, path):
    """The checkpoint's log as CSV, always as a whole, so that no kill loses or doubles a row."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["epoch", "seconds", *COLUMNS])
    table.writeheader()
    table.writerows(run.log)
    replace(path.with_suffix(".csv"), text.getvalue().encode())


def replace(path, content):
    """Writes a file so that a kill at any moment leaves the old content or the new."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def restore(run, path):
    """Puts run where a checkpoint left it and returns its last epoch. ValueError where the checkpoint is of another
    run or of weights alone, OSError where it is not there."""
    checkpoint = read_checkpoint(path)
    if other := {name: (checkpoint["settings"].get(name), run.settings.get(name))
                 for name in {**checkpoint["settings"], **run.settings}
                 if checkpoint["settings"].get(name) != run.settings.get(name)}:
        differ = ", ".join(f"{name} {theirs} (now {ours})" for name, (theirs, ours) in other.items())
        raise ValueError(f"{path} was trained with {differ}: give the same flags, or another --out")
    try:
        for name, part in vars(run).items():
            if name not in ("settings", "log"):
                part.load_state_dict(checkpoint[name])
        run.log = checkpoint["log"]
        torch.set_rng_state(checkpoint["random"])
        device = next(run.f.parameters()).device
        if device.type == "cuda" and "random_cuda" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["random_cuda"], device)
        return run.log[-1]["epoch"]
    except Exception as error:  # whatever a part of it makes of what is not its state
        raise ValueError(f"{path} is not the whole state of a run, it cannot be resumed ({type(error).__name__}: "
                         f"{str(error).splitlines()[0][:120]})") from None


# --- The loop -----------------------------------------------------------------------------------------------------

COLUMNS = {"loss": "{:.3f}", "nll": "{:.3f}", "fool": "{:.3f}", "cycle": "{:.3f}", "critic": "{:.3f}",
           "success": "{:.1%}", "val_error": "{:.2%}", "rho": "{:.4f}"}


def train_epoch(step, run, x, y, epoch, announce=0):
    """One pass over x (bytes), y in batches of a random order; the means of what step(run, x, y) returns, as floats.
    announce: print how long this many epochs will take, once the first steps are done. FloatingPointError ends it."""
    order = torch.randperm(len(x), device=x.device)[:len(x) // BATCH * BATCH].view(-1, BATCH)
    rows, times = [], []
    for i, batch in enumerate(order, 1):
        parts = step(run, x[batch] / 255, y[batch])
        rows.append(torch.stack(list(parts.values())))  # stays on the device: one read an epoch
        if announce and i in (5, 20):
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter())
            if i == 20:
                seconds = (times[1] - times[0]) / 15
                clear_line()
                print(f"      {1000 * seconds:.0f} ms a step, so the {announce} epochs to go will take about "
                      f"{clock(seconds * len(order) * announce)} (hours:minutes:seconds)", flush=True)
        if sys.stderr.isatty():
            print(f"\repoch {epoch} step {i}/{len(order)}\033[K", end="", file=sys.stderr, flush=True)
    rows = torch.stack(rows)                            # (steps, parts)
    bad, nets = (~rows.isfinite()).any(1), (run.f, getattr(run, "D", run.f))
    if bad.any() or not all(weight.isfinite().all() for net in nets for weight in net.parameters()):
        step = bad.int().argmax().item() + 1 if bad.any() else len(order)
        raise FloatingPointError(f"the loss or a weight is not finite from step {step} of epoch {epoch} on")
    return dict(zip(parts, rows.mean(0).tolist()))


def clear_line():
    """Takes the step counter off the terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def clock(seconds):
    """Hours, minutes and seconds, '1:02:03'."""
    return str(datetime.timedelta(seconds=round(seconds)))


def train(run, path, x, y, x_val, y_val):
    """Trains run to its last epoch; after each one line on the screen, and the checkpoint and its log on disk."""
    defense, epochs = run.settings["defense"], run.settings["epochs"]
    begin = len(run.log) + (defense != "critic")  # the critic's epoch 0 is that of pretraining
    columns = {name: form for name, form in COLUMNS.items()
               if name in ("val_error", "rho") or (name == "loss") == (defense != "critic")}
    print(f"{'epoch':>5} {'time':>8} {'left':>8} " + " ".join(f"{name:>9}" for name in columns), flush=True)
    for epoch in range(begin, epochs + 1):
        began = time.perf_counter()
        step = baseline_step if defense != "critic" else critic_step if epoch else pretrain_step
        set_learning_rates(run, epoch)
        row = train_epoch(step, run, x, y, epoch, announce=epochs - epoch + 1 if epoch == max(begin, 1) else 0)
        row["val_error"] = error_rate(run.f, x_val / 255, y_val)
        robustness = measure(run.f, x_val[:100] / 255, y_val[:100], deepfool)
        row["rho"] = robustness["rho"]
        seconds = time.perf_counter() - began
        run.log.append({"epoch": epoch, "seconds": round(seconds, 1), **row})
        save(run, path)
        left = clock(seconds * (epochs - epoch)) if epoch else ""
        clear_line()
        cells = " ".join(f"{form.format(row[name]) if name in row else '':>9}" for name, form in columns.items())
        warn = [f"rho without {robustness['failed']} images that were not fooled"] * (robustness["failed"] > 0)
        warn += ["COLLAPSED, see success and val_error"] * (row.get("success", 1) < 0.5 or row["val_error"] > 0.5)
        print(f"{epoch:>5} {clock(seconds):>8} {left:>8} {cells}  {'; '.join(warn)}".rstrip(), flush=True)


# --- Speed --------------------------------------------------------------------------------------------------------

def time_steps(settings, args, steps=30):
    """Median seconds of a training step, and the peak memory in MB of this process, on CUDA that of the device."""
    import resource  # here, as Windows has none
    run, step = start(settings, args.device), critic_step if settings["defense"] == "critic" else baseline_step
    x, y, *_ = load(args.data, args.data_dir, settings["train_images"], args.device)
    seconds = []
    for batch in torch.randperm(len(x), device=x.device)[:(steps + 5) * BATCH].split(BATCH):
        begin = time.perf_counter()
        step(run, x[batch] / 255, y[batch])
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if x.is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(seconds[5:]), peak / 1e6


def bench(args):
    """Prints the speed of a step and the memory it takes, of each network with the critic and without, each in a fresh
    process."""
    print(f"{'arch':6} {'defense':10} {'ms a step':>9} {'peak MB':>8}")
    for arch, defense in itertools.product(NETWORKS, ("critic", "reference")):
        settings = parse_flags(["--arch", arch, "--defense", defense, "--data", args.data])[1]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(time_steps, (settings, args))
        print(f"{arch:6} {defense:10} {1000 * seconds:>9.1f} {peak:>8.0f}", flush=True)
    return 0


# --- Command line -------------------------------------------------------------------------------------------------

def parse_flags(argv):
    """The command line as argparse has it, and the settings of the run, a dict that its checkpoint keeps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=list(NETWORKS), default="lenet", help="default lenet")
    parser.add_argument("--defense", choices=["critic", *BASELINES], default="critic", help="default critic")
    parser.add_argument("--epochs", type=number(int, 1), help="default 100; the critic's epoch of pretraining is extra")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, batches, noise, targets")
    parser.add_argument("--train-images", type=number(int, BATCH, 50000), help="their number, default 50000")
    add_data_flags(parser, default="mnist")
    parser.add_argument("--out", type=Path, metavar="FILE.pt",
                        help="default runs/ARCH-DEFENSE[-quick][-strokes]-SEED.pt; the log is FILE.csv beside it")
    parser.add_argument("--resume", action="store_true", help="continue --out")
    parser.add_argument("--quick", action="store_true",
                        help="minutes on a CPU: 18000 training images, 2 epochs after that of pretraining (others: 3)")
    parser.add_argument("--bench", action="store_true", help="only print the speed of a training step and its memory")
    paper = parser.add_argument_group("constants of the paper, for --defense critic")
    paper.add_argument("--lam", type=number(float, 0), help="of fooling the critic, Eq. 5: 0.1 for lenet, 0.5 for mlp")
    paper.add_argument("--lambda-rec", type=number(float, 0), help="of the cycle term, Eq. 6: 0.01")
    paper.add_argument("--lambda-grad", type=number(float, 0), help="of the critic's gradient norm penalty: 10")
    paper.add_argument("--attack-steps", type=number(int, 1), help="of Algorithm 1: 5")
    paper.add_argument("--target", choices=["closest", "uniform"], help="class of the attack: closest")
    args = parser.parse_args(argv)

    critic_only = {"lam": 0.1 if args.arch == "lenet" else 0.5, "lambda_rec": 0.01, "lambda_grad": 10.0,
                   "attack_steps": 5, "target": "closest"}
    default = {"epochs": 100, "train_images": 50000}
    if args.quick:
        default = {"epochs": 2 if args.defense == "critic" else 3, "train_images": 18000}
    if args.defense == "critic":
        default |= critic_only
    elif given := [name for name in critic_only if getattr(args, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')} is a constant of --defense critic, not of {args.defense}")
    settings = {name: getattr(args, name) for name in ("arch", "defense", "seed", "data")}
    settings |= {name: value if getattr(args, name) is None else getattr(args, name) for name, value in default.items()}
    if args.out is None:
        args.out = Path("runs", "-".join([args.arch, args.defense, *["quick"] * args.quick,
                                          *["strokes"] * (args.data == "strokes"), f"{args.seed}.pt"]))
    if args.out.suffix != ".pt":
        parser.error(f"--out {args.out}: expected a name that ends in .pt")
    return args, settings


def load(source, data_dir, train_images, device):
    """Training and validation sets on the device; the first 10,000 images are held out (as the authors' code does).
    The images are bytes, 0 to 255, a quarter of the memory."""
    n = 10000 + train_images
    x, y = data.load_mnist(data_dir)[:2] if source == "mnist" else data.stroke_digits(n, seed=0)
    x, y = x[:n].mul(255).round_().byte().to(device), y[:n].to(device)
    return x[10000:], y[10000:], x[:10000], y[:10000]


def main(argv=None):
    """The command line; returns the exit status."""
    args, settings = parse_flags(argv)
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if args.bench:
            return bench(args)
        run = start(settings, args.device)
        if args.resume:
            last = restore(run, args.out)
            save_log(run, args.out)
            if last == settings["epochs"]:
                print(f"{args.out} is finished, with all of its {settings['epochs']} epochs.")
                return 0
        else:
            for path in (args.out, args.out.with_suffix(".csv")):
                if path.exists():
                    raise ValueError(f"{path} is there already and would be overwritten: --resume continues a "
                                     "checkpoint, --out names another")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace(args.out, b"")  # whether it can be written is known now, not after the first epoch
            args.out.unlink()
        sets = load(args.data, args.data_dir, settings["train_images"], args.device)
        name = torch.cuda.get_device_name(args.device) if sets[0].is_cuda else f"{torch.get_num_threads()} threads"
        print(f"torch {torch.__version__} on {args.device} ({name})")
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{args.out} and {args.out.with_suffix('.csv')} are written after each epoch", flush=True)
    except (OSError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted before the first step.", file=sys.stderr)
        return 130
    try:
        train(run, args.out, *sets)
    except KeyboardInterrupt:
        kept = (f"{args.out} keeps the last whole epoch; go on with: {command}{'' if args.resume else ' --resume'}"
                if args.out.exists() else "No epoch was finished, so nothing was saved.")
        print(f"\nInterrupted. {kept}", file=sys.stderr)
        return 130
    except (FloatingPointError, OSError) as error:
        kept = f"{args.out} keeps the last good epoch" if args.out.exists() else "no epoch was finished before it"
        print(f"\ntrain.py: error: {error}; {kept}", file=sys.stderr)
        return 2
    print(f"Done. On the test set: python eval.py {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
