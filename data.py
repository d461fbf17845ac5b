"""MNIST by hand: find, download, verify, parse. And drawn digits, an offline stand-in to run everything without it.

    x_train, y_train, x_test, y_test = load_mnist("data")      images float32 (N,1,28,28) in [0,1], labels int64 (N,)
    x, y = drawn_digits(1000, seed=0)
"""
import gzip
import hashlib
import http.client
import os
import secrets
import urllib.request
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

MIRRORS = "https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"

# Name, shape, and SHA-256 of the decompressed file: a header of big-endian 32-bit integers, then one byte per value.
FILES = (
    ("train-images-idx3-ubyte", (60000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    ("train-labels-idx1-ubyte", (60000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ("t10k-images-idx3-ubyte", (10000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    ("t10k-labels-idx1-ubyte", (10000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)


# --- MNIST --------------------------------------------------------------------------------------------------------

def load_mnist(data_dir=None, mirrors=MIRRORS):
    """MNIST (LeCun and Cortes) from its four IDX files in data_dir, gzipped or not, or in MNIST/raw below it, where
    torchvision puts them. A file that is missing is downloaded into data_dir, from the first mirror that has it.

    data_dir is $MNIST_DIR or "data" if it is not given. Returns x_train (60000,1,28,28) float32 in [0,1], y_train
    (60000,) int64, x_test (10000,1,28,28), y_test (10000,). ValueError if a file does not hold exactly the published
    bytes, OSError if a file is missing and no mirror has it.
    """
    data_dir = Path(data_dir or os.environ.get("MNIST_DIR") or "data").expanduser()
    tensors = []
    for name, shape, sha256 in FILES:
        content = find(data_dir, name, sha256) or download(data_dir, name, sha256, mirrors)
        header = 4 + 4 * len(shape)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
        tensors.append(values[:, None].float() / 255 if len(shape) == 3 else values.long())
    return tuple(tensors)


def find(data_dir, name, sha256):
    """The verified content of a file that is on disk, or None. ValueError if there is a file, but another one."""
    for path in (data_dir / folder / (name + ending) for folder in ("", "MNIST/raw") for ending in ("", ".gz")):
        if path.is_file():
            try:
                return verify(path.read_bytes(), sha256)
            except ValueError as error:
                raise ValueError(f"{path} is not MNIST's {name}: {error}. Delete it to download it anew") from None
    return None


def verify(content, sha256):
    """content, decompressed if it is gzipped. ValueError if it is not the published file."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"the gzip archive is broken ({error})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"it has {len(content)} bytes, begins with {content[:12]!r} and has not the published SHA-256")
    return content


def download(data_dir, name, sha256, mirrors):
    """The content of name, from the first mirror that has it. Only a verified archive is put into data_dir."""
    failures = []
    for mirror in mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=10) as response:
                archive = response.read()
            content = verify(archive, sha256)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"  {mirror}: {error}")
            continue
        data_dir.mkdir(parents=True, exist_ok=True)
        replace(data_dir / f"{name}.gz", archive)
        return content
    raise FileNotFoundError("\n".join([
        f"MNIST's {name} is not in {data_dir}, and no mirror gave it:", *failures,
        f"Put the four files into {data_dir}, gzipped or not, or name their folder with --data-dir or $MNIST_DIR:",
        f"  {', '.join(name for name, _, _ in FILES)}", "Or run on digits that the computer draws: --data drawn"]))


def replace(path, content):
    """Writes content, bytes, to path. A kill at any moment leaves the old file or the new one, both whole."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two runs may write at once
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- Drawn digits -------------------------------------------------------------------------------------------------

FONT = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#...# #.#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ....#
.###. ##### ##### .###. ...#. .###. .###. .#... .###. .###.
"""


def drawn_digits(n, seed):
    """n drawn digits in MNIST's shapes: x (n,1,28,28) float32 in [0,1], y (n,) int64. Each is the glyph of its class in
    FONT, with a random scale, slant, shift, thickness and pixel noise, which the seed sets."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)
    rows = [[[mark == "#" for mark in glyph] for glyph in line.split()] for line in FONT.strip().split("\n")]
    glyphs = torch.tensor(rows).float().transpose(0, 1)[:, None]                               # (10,1,7,5)
    glyphs = F.interpolate(F.pad(glyphs, (2, 2, 2, 2)), scale_factor=8, mode="bicubic")        # (10,1,88,72)
    y = torch.randint(10, (n,), generator=generator)
    scale_x, slant, scale_y = uniform(1.0, 1.4, n), uniform(-0.2, 0.5, n), uniform(0.8, 1.2, n)
    shift_x, shift_y = uniform(-0.15, 0.15, 2, n)
    affine = torch.stack([scale_x, slant, shift_x, torch.zeros(n), scale_y, shift_y], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, (n, 1, 28, 28), align_corners=False)
    ink = F.grid_sample(glyphs[y], grid, align_corners=False)                                  # (n,1,28,28)
    ink = 3 * (ink - uniform(0.1, 0.4, n, 1, 1, 1)) + 0.05 * torch.randn(n, 1, 28, 28, generator=generator)
    return (255 * ink.clamp(0, 1)).round() / 255, y  # of 256 shades, as MNIST


def load(source, data_dir=None):
    """The four tensors of load_mnist, by name: "mnist", or "drawn" for as many drawn digits of the same shapes."""
    if source == "mnist":
        return load_mnist(data_dir)
    *training, test = [drawn_digits(10000, seed) for seed in range(7)]
    return *(torch.cat(part) for part in zip(*training)), *test
