"""The numbers of README.md beside it that no file of eval.py holds. From the folder above:

    python results/checks.py confidence                  LeNet's reference under the paper's attack, to 0.99
    python results/checks.py stretch                     what looks like its target, at another network's length
    python results/checks.py chance FILE.json            by worst: the differences of neighbours, their standard errors
    python results/checks.py chance FILE.json FILE-cw.json          the same on its images, with Carlini-Wagner in worst
    python results/checks.py steps FILE.json             the time of a training step beside that without a defense
    python results/checks.py stronger FILE.json FILE.pt...          adv-lib's FAB and ALMA too; --json of their rows

`stronger` wants more than torch: `pip install numpy tqdm`, `pip install --no-deps adv-lib==0.2.8`.
"""
import json
import statistics
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval as evaluation  # eval is a builtin; before torch, to filter what torch warns of where numpy is not
import torch

import data
import train
from advcritic import closest_class, per_image
from eval import high_confidence_attack, l2, load_checkpoint, measure, paper_attack, share, vote

RESULTS = Path(__file__).parent


def images(n):
    """The 50,000 training images, their labels, and the first n test images of eval.py and theirs."""
    x_train, y_train, x, y = data.load_mnist()
    some = torch.randperm(10000, generator=torch.Generator("cpu").manual_seed(0))[:n]
    return x_train[10000:], y_train[10000:], x[some], y[some]


def confidence():
    """To which confidence the paper's attack goes decides how far: 0.99 in place of the clean image's own."""
    x_train, y_train, x, y = images(1000)
    f, _ = load_checkpoint(RESULTS / "lenet-reference.pt")
    found = measure(f, x, y, lambda f, x, y: high_confidence_attack(f, x, closest_class(f, x, y), 0.99))
    moved = (found["length"] > 0) & found["length"].isfinite()
    x_adv = found["x_adv"][moved]
    looks = vote(x_adv, x_train, y_train) == f(x_adv).argmax(1)
    unsure = 1 - f(x).double().softmax(1).amax(1).median().item()
    print(f"median confidence 1 - {unsure:.2g}, to 0.99: rho {found['rho']:.3f}, "
          f"looks like target {100 * share(looks):.1f}%")


def stretch():
    """The changes of one network's images at the length that the other network needs for the same image."""
    x_train, y_train, x, y = images(200)
    r, target = {}, {}
    for name in ("reference", "critic"):
        f, _ = load_checkpoint(RESULTS / f"lenet-{name}.pt")
        x_adv = paper_attack(f, x, y)
        r[name], target[name] = x_adv - x, f(x_adv).argmax(1)
    both = (l2(r["reference"]) > 0) & (l2(r["critic"]) > 0)  # right on the clean image, and moved to the target
    for name in r:
        for length in r:
            x_adv = (x + per_image(l2(r[length]) / l2(r[name]), x) * r[name]).clamp(0, 1)
            looks = vote(x_adv[both], x_train, y_train) == target[name][both]
            print(f"{name} at the length of {length}: {100 * share(looks):.0f}% of {len(looks)} look like their target")


def chance(*paths):
    """Of neighbours by worst, the smallest length in the files: the difference of rho, a mean over the images and the
    seeds, and its standard error."""
    smallest = {}
    for path in paths:
        for row in json.loads(Path(path).read_text())["results"]:
            length = torch.tensor([torch.inf if value is None else value for value in row["length"]])
            key = row["settings"]["defense"], row["settings"]["seed"]
            other = smallest.get(key, length)
            n = min(len(length), len(other))
            smallest[key] = torch.minimum(length[:n], other[:n])
    x = images(n)[2]
    groups = {}
    for (defense, _), length in smallest.items():
        groups.setdefault(defense, []).append(length / l2(x))
    rho = {defense: torch.stack(seeds).mean(0) for defense, seeds in groups.items()}
    order = sorted(rho, key=lambda defense: -rho[defense].mean())
    for first, second in zip(order, order[1:]):
        difference = rho[first] - rho[second]
        error = difference.std().item() / len(x) ** 0.5
        print(f"{first} - {second}: {difference.mean().item():.4f}, standard error {error:.4f}")


def steps(path):
    """The time of a training step of each defense, in units of that without one: in turn in one process, one thread,
    medians of 11 rounds."""
    torch.set_num_threads(1)
    x_train, y_train, _, _ = images(1)
    x, y = x_train[:100], y_train[:100]
    found = {}
    for arch in evaluation.NETWORKS:
        flags = {defense: ["--arch", arch, "--defense", defense] for defense in ("critic", *train.BASELINES)}
        runs = {defense: train.start(train.parse_flags(some)[1], "cpu") for defense, some in flags.items()}
        seconds = {defense: [] for defense in runs}
        for _ in range(11):
            for defense, run in runs.items():
                start = time.perf_counter()
                train.step(run, 1, x, y)
                seconds[defense].append(time.perf_counter() - start)
        median = {defense: statistics.median(some) for defense, some in seconds.items()}
        found[arch] = {defense: median[defense] / median["reference"] for defense in runs}
        print(arch, ", ".join(f"{defense} {ratio:.1f}" for defense, ratio in found[arch].items()))
    Path(path).write_text(json.dumps(found) + "\n")


def stronger(path, *checkpoints):
    """worst by DeepFool and DDN, and by FAB and ALMA too, on 200 images; rows are added to the file at path."""
    for name in ("torchvision", "torchvision.models", "visdom"):  # adv-lib imports them for what is not used here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    from adv_lib.attacks import alma, fab
    path, (_, _, x, y) = Path(path), images(200)
    rows = json.loads(path.read_text()) if path.exists() else []
    attacks = {"deepfool": evaluation.deepfool, "ddn": evaluation.ddn,
               "fab": lambda f, x, y: fab(f, x, y, norm=2, n_iter=100),
               "alma": lambda f, x, y: alma(f, x, y, distance="l2", num_steps=1000)}
    for checkpoint in checkpoints:
        f, settings = load_checkpoint(checkpoint)
        runs = {name: measure(f, x, y, attack, f"{checkpoint} {name}") for name, attack in attacks.items()}
        row = {"checkpoint": checkpoint, "settings": settings, "images": len(x)}
        row.update({name: run["rho"] for name, run in runs.items()})
        row["failed"] = {name: run["failed"] for name, run in runs.items()}
        for name, some in (("worst", ("deepfool", "ddn")), ("worst with FAB and ALMA", tuple(attacks))):
            row[name] = evaluation.mean_rho(x, torch.stack([runs[attack]["length"] for attack in some]).amin(0))
        rows.append(row)
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(f"{checkpoint}: worst {row['worst']:.4f}, with FAB and ALMA {row['worst with FAB and ALMA']:.4f}")


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    {"confidence": confidence, "stretch": stretch, "chance": chance, "steps": steps,
     "stronger": stronger}[check](*arguments)
