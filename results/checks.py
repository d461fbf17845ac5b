"""What README.md beside this file says beyond the tables of eval.py. From the folder above:

    python results/checks.py pages              holds each table of both pages against the files here
    python results/checks.py chance mlp         the differences of rho between neighbours, and their standard errors
    python results/checks.py sure mlp           how sure the networks are of clean images, and how long an image is
    python results/checks.py steps mlp          the time of a training step, in units of plain training: steps.txt
    python results/checks.py stronger FILE.pt   what FAB and ALMA find on 100 images that our attacks do not

`stronger` wants more than torch: pip install numpy tqdm, and pip install --no-deps adv-lib==0.2.8.
"""
import json
import re
import statistics
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # eval is a builtin; before torch, to silence what torch says without numpy
import torch

import data
import train
from advcritic import l2

# The pages' headings for columns of eval.py's tables.
COLUMNS = {"error %": "test error %", "looks %": "looks like target %", "paper's attack": "paper"}


def test_images(n):
    """The first n of the test images that eval.py attacks, and their labels."""
    _, _, x, y = data.load_mnist()
    some = torch.randperm(10000, generator=torch.Generator().manual_seed(0))[:n]
    return x[some], y[some]


def rows_of(arch):
    """The rows of results/ARCH.json by defense, and beyond them: cw, Carlini-Wagner's rho on 100 images, from
    ARCH-cw.json; step from steps.txt; and what follows from the lengths and from Figure 2."""
    rows = {row["settings"]["defense"]: row for row in json.loads((HERE / f"{arch}.json").read_text())}
    for row in json.loads((HERE / f"{arch}-cw.json").read_text()):
        rows[row["settings"]["defense"]]["cw"] = row["cw"]
    for defense, step in re.findall(rf"{arch} (\w+) ([\d.]+)", (HERE / "steps.txt").read_text()):
        rows[defense]["step"] = float(step)
    for row in rows.values():
        row["look new of 90"] = row["figure 2"]["look like target"]
        row["robust %"] = 100 * statistics.mean(length is None or length > 2 for length in row["length"])
    return rows


def neighbours(rows):
    """Of neighbours in the order of rho: (first, second, difference, its standard error over the same images)."""
    norm = l2(test_images(len(rows["critic"]["length"]))[0])
    rho = {defense: torch.tensor(row["length"]) / norm for defense, row in rows.items()}
    names = sorted(rho, key=lambda defense: -rho[defense].mean())
    found = []
    for first, second in zip(names, names[1:]):
        difference = rho[first] - rho[second]
        found.append((first, second, difference.mean().item(), difference.std().item() / len(norm) ** 0.5))
    return found


def chance(arch):
    for first, second, difference, error in neighbours(rows_of(arch)):
        print(f"`{first}` - `{second}` | {difference:.4f} | {error:.4f}")


def sure(arch):
    """Of each network, the mean probability of the right class on the test images that it reads right."""
    x, y = test_images(1000)
    for defense, row in rows_of(arch).items():
        f, _ = evaluation.load_checkpoint(ROOT / row["checkpoint"])
        probability, predicted = evaluation.batched_logits(f, x).softmax(1).max(1)
        print(f"{arch} {defense}: {100 * probability[predicted == y].mean():.1f}%")
    print(f"the mean length of an image: {l2(x).mean():.1f}")


def shown(cell, row, column):
    """Whether a cell such as 0.274 (0.288) is this figure of ours, rounded, and the paper's value."""
    number, _, paper = cell.rstrip(")").partition(" (")
    digits = len(number.partition(".")[2])
    settings = row["settings"]
    values = evaluation.PAPER.get(f"{settings['arch']} {settings['defense']}", ())
    papers = dict(zip(evaluation.PAPER_COLUMNS, values))
    return number == f"{row[column]:.{digits}f}" and (not paper or paper == f"{papers[column]:.{digits}f}")


def pages():
    """Exits with an error if a cell of a table is not what the files say."""
    networks = {"MLP": rows_of("mlp"), "LeNet": rows_of("lenet")}
    checked, wrong = 0, []
    chances = {f"{name}: `{first}` - `{second}`": (f"{difference:.4f}", f"{error:.4f}")
               for name, rows in networks.items() for first, second, difference, error in neighbours(rows)}
    for page in ("README.md", "results/README.md"):
        header = None
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            if not line.startswith("|"):
                header = None
                continue
            cells = [cell.replace("*", "").strip() for cell in line.strip("|").split("|")]
            if header is None:
                header = cells
                continue
            defense = re.search(r"`(\w+)`", cells[0])
            for column, cell in zip(header[1:], cells[1:]):
                column, _, network = column.partition(", ")
                column = COLUMNS.get(column, column)
                if cells[0] in chances:
                    good = cell == chances[cells[0]][column == "standard error"]
                elif defense and network and cell != "–" and column in networks[network][defense[1]]:
                    good = shown(cell, networks[network][defense[1]], column)
                else:
                    continue
                checked += 1
                if not good:
                    wrong.append(f"{page}: {cells[0]}, {network} {column}: {cell}")
    print("\n".join([*wrong, f"{checked} cells of both pages are those of the files in results, but for {len(wrong)}"]))
    if wrong or checked < 100:
        sys.exit(1)


def steps(arch):
    """One thread, in turn in one process, the medians of 11 rounds."""
    torch.set_num_threads(1)
    x, y = (part[10000:10100] for part in data.load_mnist()[:2])
    runs, seconds = {}, {}
    for defense in ("reference", *train.BASELINES, "critic"):
        runs[defense] = train.start(train.parse_flags(["--arch", arch, "--defense", defense])[1], "cpu")
        seconds[defense] = []
    for _ in range(11):
        for defense, run in runs.items():
            began = time.perf_counter()
            train.step(run, 1, x, y)
            seconds[defense].append(time.perf_counter() - began)
    median = {defense: statistics.median(some) for defense, some in seconds.items()}
    for defense, some in median.items():
        print(f"{arch} {defense} {some / median['reference']:.1f}")


def stronger(path):
    for name in ("torchvision", "torchvision.models", "visdom"):  # adv-lib imports them for what is not used here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    from adv_lib.attacks import alma, fab
    f, _ = evaluation.load_checkpoint(path)
    x, y = test_images(100)
    attacks = {"deepfool": evaluation.deepfool, "ddn": evaluation.ddn,
               "FAB": lambda f, x, y: fab(f, x, y, norm=2, n_iter=100),
               "ALMA": lambda f, x, y: alma(f, x, y, distance="l2", num_steps=1000)}
    length = {name: evaluation.measure(f, x, y, attack, name)["length"] for name, attack in attacks.items()}
    ours = torch.minimum(length["deepfool"], length["ddn"])
    right = ours > 0
    for name in ("FAB", "ALMA"):
        share = (length[name] < 0.999 * ours)[right].float().mean().item()
        both = torch.minimum(ours, length[name])
        print(f"{path}: {name} is shorter by more than 0.1% on {100 * share:.0f} of 100 images, and takes "
              f"{100 * (1 - evaluation.mean_rho(x, both) / evaluation.mean_rho(x, ours)):.1f}% off rho "
              f"(its own rho {evaluation.mean_rho(x, length[name]):.4f}, ours {evaluation.mean_rho(x, ours):.4f})")


CHECKS = {"pages": pages, "chance": chance, "sure": sure, "steps": steps, "stronger": stronger}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHECKS:
        sys.exit(__doc__)
    CHECKS[sys.argv[1]](*sys.argv[2:])
