"""Packs MNIST's four idx files into this folder as xz, with their checksums: `python mnist_dist/tasks/mnist/files/pack.py FOLDER`.

FOLDER holds the files as published (gzip). xz makes 9.2 MB of what gzip keeps in 11.4 MB.
"""

import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def pack(source: Path, target: Path) -> None:
    """Write NAME.xz for each file, and checksums.json: the SHA-256 of each unpacked file."""
    checksums = {}
    for name in NAMES:
        raw = gzip.decompress((source / f"{name}.gz").read_bytes())
        checksums[name] = hashlib.sha256(raw).hexdigest()
        (target / f"{name}.xz").write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    (target / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_WITH_THE_GZIP_FILES")
    pack(Path(sys.argv[1]), Path(__file__).parent)
