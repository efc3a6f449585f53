"""Loading data sets as uint8 tensors, and splitting them.

A folder works as it lies: archives, `.gz` files or unpacked ones, directly in it or in the usual sub-folder. Nothing
is written to it, unless a missing set is downloaded into it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitcmp.configs import DATASETS, DataConfig, UserError, choose, split
from vitcmp.data.stratify import stratified_split

CIFAR = {
    "cifar10": {
        "archive": "cifar-10-python.tar.gz",
        "md5": "c58f30108f718f92721af3b95e74349a",
        "folder": "cifar-10-batches-py",
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
        "names": ("batches.meta", b"label_names"),
        "labels": b"labels",
    },
    "cifar100": {
        "archive": "cifar-100-python.tar.gz",
        "md5": "eb9058c3a382ffc7106e4002c42a8d85",
        "folder": "cifar-100-python",
        "train": ["train"],
        "test": ["test"],
        "names": ("meta", b"fine_label_names"),
        "labels": b"fine_labels",
    },
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"

IDX_FILES = {
    "train-images-idx3-ubyte": 60_000,
    "train-labels-idx1-ubyte": 60_000,
    "t10k-images-idx3-ubyte": 10_000,
    "t10k-labels-idx1-ubyte": 10_000,
}
IDX_MD5 = {
    "mnist": [
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ],
    "fashion-mnist": [
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ],
}
IDX_URL = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot"


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a data set."""

    images: Tensor
    """uint8, [N, C, height, width]."""
    labels: Tensor
    """int64, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """The samples at these places."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """A data set, split into train, validation (out of the official training part) and test."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Of the training images in 0..1, a channel each."""
    std: tuple[float, ...]
    digest: str
    """Of the files that were read, or of the pixels where there are none."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Raw:
    train: Split
    test: Split
    class_names: tuple[str, ...]
    digest: str
    warnings: tuple[str, ...] = ()


def load_data(dataset: str | DataConfig = "digits", data_dir: str | None = None, **settings: Any) -> Data:
    """Load a data set by name, and split off its validation images (stratified, the same for every seed).

        >>> data = load_data("digits")
        >>> data.train.images.shape, data.train.images.dtype
        (torch.Size([1293, 1, 8, 8]), torch.uint8)

    `data_dir` defaults to the environment's VITCMP_DATA, then ~/.cache/vitcmp; `settings` are those of DataConfig.

    Raises: UserError for an unknown set, or files that are neither there nor to be downloaded.
    """
    (config,) = split({**settings, "dataset": dataset}, DataConfig) if isinstance(dataset, str) else (dataset,)
    choose(config.dataset, DATASETS, "dataset")
    chosen = data_dir or os.environ.get("VITCMP_DATA")
    if chosen and not Path(chosen).is_dir():
        raise UserError(f"no data folder '{chosen}'; create it, or point --data-dir or VITCMP_DATA elsewhere")
    raw = _LOADERS[config.dataset](config.dataset, Path(chosen or "~/.cache/vitcmp").expanduser())
    _check_labels(config.dataset, raw.train, raw.test)
    if config.invert:
        raw = _Raw(_inverted(raw.train), _inverted(raw.test), raw.class_names, raw.digest, raw.warnings)
    kept, held_out = _stratified(raw.train.labels, config.validation)
    if config.train_samples is not None:
        if config.train_samples > len(kept):
            raise UserError(f"train_samples ({config.train_samples}) must be at most {len(kept)} for {config.dataset}")
        kept = kept[: config.train_samples]
    train = raw.train.take(kept)
    mean, std = _statistics(train.images)
    return Data(
        config.dataset, train, raw.train.take(held_out), raw.test, raw.class_names, mean, std, raw.digest, raw.warnings
    )


def _check_labels(name: str, *parts: Split) -> None:
    classes = DATASETS[name]["num_classes"]
    for part in parts:
        if part.images.ndim != 4 or len(part.images) != len(part.labels) or part.labels.max() >= classes:
            shape, count, top = tuple(part.images.shape), len(part.labels), int(part.labels.max())
            raise UserError(f"{name}: images {shape} do not fit {count} labels up to {top}; fetch the files again")


def _inverted(part: Split) -> Split:
    return Split(255 - part.images, part.labels)


def _stratified(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Places kept and held out, in a fixed random order, with every class in proportion."""
    try:
        kept, held_out = stratified_split(labels.numpy(), share)
    except ValueError as error:
        raise UserError(f"validation ({share}) does not split {len(labels)} images: {error}") from None
    return torch.from_numpy(kept), torch.from_numpy(held_out)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in 0..1, from its histogram: exact, and no float copy of the set."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten().int(), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append(max((share * (values - mean).square()).sum().sqrt().item(), 1e-6))
    return tuple(means), tuple(stds)


def _digits(name: str, root: Path) -> _Raw:
    """Scikit-learn's 1,797 digits, read from its file, since its import takes a second."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    everything = Split(images, labels)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    train, test = _stratified(labels, 0.2)
    names = tuple(str(i) for i in range(10))
    return _Raw(everything.take(train), everything.take(test), names, digest)


def _fake(name: str, root: Path) -> _Raw:
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(0, 10, (count,), generator=generator))

    return _Raw(noise(2560), noise(512), tuple(f"class {i}" for i in range(10)), "seeded noise, version 1")


def _idx(name: str, root: Path) -> _Raw:
    """MNIST and Fashion-MNIST: four files, plain or gzipped."""
    folders = {
        "mnist": ("mnist/raw", "mnist", "MNIST/raw", "raw", "."),
        "fashion-mnist": ("fashion-mnist/raw", "fashion-mnist", "FashionMNIST/raw"),
    }[name]
    arrays, digests, warnings = [], [], []
    for (file, count), md5 in zip(IDX_FILES.items(), IDX_MD5[name], strict=True):
        path = _find(root, [f"{folder}/{file}{ending}" for folder in folders for ending in (".gz", "")])
        path = path or _download(IDX_URL[name] + file + ".gz", root / folders[0], md5, name)
        content = path.read_bytes()
        digests.append(hashlib.md5(content, usedforsecurity=False).hexdigest())
        if path.suffix == ".gz" and digests[-1] != md5:
            warnings.append(f"{path.name} is not the official file of {name} (md5 {digests[-1]})")
        arrays.append(_parse_idx(path, content, count))
    names = tuple(str(i) for i in range(10)) if name == "mnist" else tuple(FASHION.split())
    images, labels, test_images, test_labels = arrays
    return _Raw(
        Split(images.unsqueeze(1), labels.long()),
        Split(test_images.unsqueeze(1), test_labels.long()),
        names,
        hashlib.sha256("".join(digests).encode()).hexdigest()[:16],
        tuple(warnings),
    )


def _parse_idx(path: Path, content: bytes, count: int) -> Tensor:
    """A file of unsigned bytes in LeCun's idx format: magic number, sizes (big-endian), values."""
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        rank = content[3]
        sizes = np.frombuffer(content, ">i4", count=rank, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes)
        if content[:3] != b"\0\0\x08" or len(values) == 0 or len(values) > count:
            raise ValueError
    except (ValueError, IndexError, OSError, EOFError, zlib.error):
        raise UserError(f"{path.name} is damaged or no idx file; delete it and fetch it again") from None
    return torch.from_numpy(values.copy())


def _cifar(name: str, root: Path) -> _Raw:
    facts: dict[str, Any] = CIFAR[name]
    folders = (".", name, name.upper(), facts["folder"])
    wanted = [*facts["train"], *facts["test"], facts["names"][0]]
    unpacked = _find(root, [f"{folder}/{facts['folder']}/{wanted[0]}" for folder in folders[:3]])
    archive = None if unpacked else _find(root, [f"{folder}/{facts['archive']}" for folder in folders])
    if unpacked:
        read = {file: (unpacked.parent / file) for file in wanted}
        missing = [file for file, path in read.items() if not path.is_file()]
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)} beside {wanted[0]}; unpack the archive again")
        contents = {file: path.read_bytes() for file, path in read.items()}
        digest = hashlib.md5(b"".join(contents.values()), usedforsecurity=False).hexdigest()
        warnings = []
    else:
        archive = archive or _download(CIFAR_URL + facts["archive"], root / name, facts["md5"], name)
        packed = archive.read_bytes()
        digest = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        warnings = [] if digest == facts["md5"] else [f"{archive.name} is not the official archive (md5 {digest})"]
        contents = _members(archive, packed, facts["folder"], wanted)
    batches = {file: _unpickle(file, content) for file, content in contents.items()}

    def part(files: list[str]) -> Split:
        try:
            images = np.concatenate([np.asarray(batches[f][b"data"], np.uint8).reshape(-1, 3, 32, 32) for f in files])
            labels = np.concatenate([np.asarray(batches[f][facts["labels"]], np.int64) for f in files])
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{name}: {', '.join(files)} hold no CIFAR images; fetch the archive again") from None
        return Split(torch.from_numpy(images), torch.from_numpy(labels))

    meta, key = facts["names"]
    try:
        names = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in batches[meta][key])
    except (KeyError, TypeError):
        raise UserError(f"{name}: {meta} holds no class names; fetch the archive again") from None
    return _Raw(part(facts["train"]), part(facts["test"]), names, digest, tuple(warnings))


def _members(archive: Path, packed: bytes, folder: str, wanted: list[str]) -> dict[str, bytes]:
    """The contents of some files of a tar archive, read in memory: nothing is extracted to the disk."""
    contents = {}
    try:
        # All of it first: that verifies gzip's checksum, which reading member by member does not reach.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as tar:
            for member in tar:
                file = member.name.removeprefix("./").removeprefix(f"{folder}/")
                if file in wanted and member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None
                    contents[file] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        raise UserError(f"{archive.name} is damaged; delete it and fetch it again") from None
    missing = [file for file in wanted if file not in contents]
    if missing:
        raise UserError(f"{archive.name} lacks {', '.join(missing)}; delete it and fetch it again")
    return contents


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays, lists, dicts, numbers and bytes, and nothing that could run code."""

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(name: str, content: bytes) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        raise UserError(f"{name} is damaged or no plain data ({error}); fetch it again") from None


def _find(root: Path, candidates: list[str]) -> Path | None:
    return next((root / c for c in candidates if (root / c).is_file()), None)


def _download(url: str, folder: Path, md5: str, name: str) -> Path:
    """Fetch one file, its checksum verified; the error says where to put it by hand."""
    from torchvision.datasets.utils import download_url

    file = url.rpartition("/")[2]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            download_url(url, temporary, file, md5)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(temporary) / file, folder / file)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); put {file} from {url} there, "
            "or point --data-dir or VITCMP_DATA at a folder that has it"
        ) from None
    return folder / file


_LOADERS: dict[str, Callable[[str, Path], _Raw]] = {
    "digits": _digits,
    "mnist": _idx,
    "fashion-mnist": _idx,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "fake": _fake,
}
