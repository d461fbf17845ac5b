"""MNIST by hand: find, download, verify, parse. And stroke digits, an offline stand-in to run everything without it.

    x_train, y_train, x_test, y_test = load_mnist("data")      images float32 (N,1,28,28) in [0,1], labels int64 (N,)
    x, y = stroke_digits(1000, seed=0)
"""
import gzip
import hashlib
import http.client
import io
import math
import os
import secrets
import struct
import sys
import urllib.request
import zlib
from pathlib import Path

import torch

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/")

# Name, shape, and SHA-256 of the decompressed file: a header of big-endian 32-bit integers, then one byte per value.
FILES = (
    ("train-images-idx3-ubyte", (60000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    ("train-labels-idx1-ubyte", (60000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ("t10k-images-idx3-ubyte", (10000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    ("t10k-labels-idx1-ubyte", (10000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)


# --- MNIST --------------------------------------------------------------------------------------------------------

def load_mnist(data_dir=None, mirrors=MIRRORS):
    """MNIST (LeCun and Cortes) from the four IDX files in data_dir, gzipped or not, or in MNIST/raw below it, where
    torchvision puts them. Files that are missing are downloaded into data_dir from the first mirror that has them.

    data_dir defaults to $MNIST_DIR, else "data". Returns x_train (60000,1,28,28) float32 in [0,1], y_train (60000,)
    int64, x_test (10000,1,28,28), y_test (10000,). Raises ValueError where a file does not hold exactly the
    published bytes, OSError where one is missing and no mirror has it.
    """
    data_dir = Path(os.path.expanduser(data_dir or os.environ.get("MNIST_DIR") or "data"))
    if data_dir.exists() and not data_dir.is_dir():
        raise NotADirectoryError(f"{data_dir} is not a folder: expected that of MNIST's four files")
    tensors = []
    for name, shape, sha256 in FILES:
        content = bytearray(find(data_dir, name, shape, sha256) or download(data_dir, name, shape, sha256, mirrors))
        values = torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)
        tensors.append(values[:, None] / 255 if len(shape) == 3 else values.long())
    return tuple(tensors)


def find(data_dir, name, shape, sha256):
    """The verified bytes of a file that is on disk, None where it is not. ValueError where it is another file."""
    for path in (data_dir / folder / (name + ending) for folder in ("", "MNIST/raw") for ending in ("", ".gz")):
        if path.is_file():
            try:
                return verify(path.read_bytes(), shape, sha256)
            except ValueError as error:
                raise ValueError(f"{path} is not MNIST's {name}: {error}. Delete it to download it anew") from None
    return None


def verify(content, shape, sha256):
    """content, decompressed if it is gzipped. ValueError says how it differs from the published file."""
    header, size = 4 + 4 * len(shape), 4 + 4 * len(shape) + math.prod(shape)
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(size + 1)  # and not more, whatever the archive unpacks to
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"the gzip archive is broken ({error})") from None
    if content[:4] != bytes([0, 0, 8, len(shape)]):
        raise ValueError(f"neither gzip nor IDX of {len(shape)} dimensions, it begins with {content[:12]!r}")
    if len(content) < header:
        raise ValueError(f"{len(content)} bytes, too short for a header")
    found = struct.unpack(f">{len(shape)}I", content[4:header])
    if found != shape:
        raise ValueError(f"shape {found}, expected {shape}")
    if len(content) != size:
        found = f"more than {size}" if len(content) > size else f"{len(content)}"
        raise ValueError(f"{found} bytes, expected {size}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"its SHA-256 is not {sha256[:12]}...")
    return content


def download(data_dir, name, shape, sha256, mirrors):
    """Fetches name.gz from the first mirror that has it, verifies it and only then puts it into data_dir."""
    failures = []
    for mirror in mirrors:
        try:
            content = verify(archive := fetch(f"{mirror}{name}.gz", math.prod(shape) + 4096), shape, sha256)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"  {mirror}: {error}")
            continue
        data_dir.mkdir(parents=True, exist_ok=True)
        replace(data_dir / f"{name}.gz", archive)
        return content
    raise FileNotFoundError("\n".join([
        f"MNIST's {name} is not in {data_dir}, and no mirror gave it:", *failures,
        f"Put the four files into {data_dir}, gzipped or not, or name their folder with --data-dir or $MNIST_DIR:",
        f"  {', '.join(name for name, _, _ in FILES)}",
        "Or run without MNIST, on drawn digits: --data strokes"]))


def replace(path, content):
    """Writes a file so that a kill at any moment leaves the old content or the new, whoever else is writing it."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def fetch(url, limit):
    """The bytes behind url, limit at most, with a progress figure on a terminal. OSError, HTTPException, ValueError."""
    with urllib.request.urlopen(url, timeout=10) as response:
        length, content = int(response.headers.get("Content-Length") or 0), bytearray()
        while block := response.read(1 << 16):
            content += block
            if len(content) > limit:
                raise ValueError(f"sent more than {limit} bytes")
            if length > 1 << 20 and sys.stderr.isatty():
                print(f"\r{url} {len(content) / length:4.0%}", end="" if len(content) < length else "\n",
                      file=sys.stderr, flush=True)
    return bytes(content)  # if it was cut short, its checksum will not fit


# --- Stroke digits ------------------------------------------------------------------------------------------------

def arc(x, y, width, height, start, end, pieces=9):
    """Points on an ellipse around (x, y), angles in degrees, clockwise on the page from three o'clock."""
    angles = [math.radians(start + (end - start) * i / pieces) for i in range(pieces + 1)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


STROKES = (  # per digit its strokes, each a list of points: x to the right, y down, both in [0,1]
    [arc(.5, .5, .26, .42, 0, 360, 14)],
    [[(.36, .26), (.54, .08), (.54, .92)]],
    [arc(.49, .33, .25, .24, -170, 45) + [(.24, .9), (.78, .9)]],
    [arc(.46, .3, .24, .21, -150, 90, 8) + arc(.46, .71, .27, .2, -90, 150, 8)[1:]],
    [[(.56, .08), (.2, .62), (.82, .62)], [(.63, .36), (.63, .94)]],
    [[(.74, .09), (.33, .09), (.29, .46)] + arc(.47, .65, .26, .25, -130, 145)],
    [[(.66, .08), (.42, .28), (.28, .58)] + arc(.5, .69, .23, .22, 190, 550, 12)],
    [[(.22, .11), (.78, .11), (.42, .93)]],
    [arc(.5, .29, .2, .2, 90, 450, 10) + arc(.5, .7, .25, .21, -90, 270, 10)[1:]],
    [arc(.49, .32, .22, .23, 0, 360, 12) + [(.7, .45), (.64, .93)]],
)


def stroke_digits(n, seed):
    """n drawn digits, an offline stand-in with MNIST's shapes: x (n,1,28,28) float32 in [0,1], y (n,) int64.

    Each is the few strokes of its class with random slant, scale, shift, thickness, wobble and pixel noise.
    Deterministic in the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    segments = [[points[i:i + 2] for points in strokes for i in range(len(points) - 1)] for strokes in STROKES]
    most = max(map(len, segments))
    # (10,S,2,2): digit, segment, its two ends, (x, y); shorter digits repeat their last segment
    template = torch.tensor([digit + digit[-1:] * (most - len(digit)) for digit in segments]) - 0.5
    pixel = torch.arange(28.)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def draw(y):
        m = len(y)
        scale, shift = uniform(17, 22, m, 1, 1, 2), uniform(-2, 2, m, 1, 1, 2) + 13.5  # pixels
        ends = template[y]
        wave = uniform(0, 2 * math.pi, m, 1, 1, 2) + 5 * ends.flip(-1)  # moves x by y and y by x: no stroke tears
        ends = ends + uniform(0, 0.04, m, 1, 1, 2) * wave.sin()
        slant = torch.stack([uniform(-0.15, 0.35, m, 1, 1), torch.zeros(m, 1, 1)], -1)
        ends = (ends - slant * ends[..., 1:]) * scale + shift              # (m,S,2,2) in pixels
        x0, y0 = ends[:, :, 0, :, None, None].unbind(2)
        dx, dy = (ends[:, :, 1] - ends[:, :, 0])[..., None, None].unbind(2)
        right, down = pixel - x0, pixel[:, None] - y0                        # (m,S,1,28), (m,S,28,1)
        at = ((right * dx + down * dy) / (dx * dx + dy * dy)).clamp(0, 1)    # (m,S,28,28) the nearest point, 0 to 1
        distance = torch.hypot(right - at * dx, down - at * dy).amin(1)      # (m,28,28) to the nearest stroke
        ink = (uniform(1.2, 2.2, m, 1, 1) - distance).clamp(0, 1) + 0.05 * torch.randn(m, 28, 28, generator=generator)
        return (255 * ink.clamp(0, 1)).round()[:, None] / 255  # of 256 shades, as MNIST

    y = torch.randint(10, (n,), generator=generator)
    return torch.cat([draw(part) for part in y.split(100)]), y
