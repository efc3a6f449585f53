"""Loading: genuine formats in every layout, splits, and files that are damaged, malicious or missing."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import stat
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vitcmp.configs import UserError
from vitcmp.data import datasets
from vitcmp.data.datasets import load_data

IDX = list(datasets.IDX_FILES)
COUNT = 40


def digest(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def protect(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def root(tmp_path: Path) -> Any:
    folder = tmp_path / "data"
    folder.mkdir()
    yield folder
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o755)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way out: every download goes to a closed local port."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


# The files, as their makers wrote them.


def idx(values: np.ndarray) -> bytes:
    """LeCun's format: two zeros, 8 for unsigned bytes, the rank, the sizes big-endian, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def mnist_arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (2, COUNT, 28, 28)), np.arange(COUNT) % 10
    return [images[0], labels, images[1], labels]


def write_mnist(folder: Path, zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(IDX, mnist_arrays(), strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: text and bytes are one, and load as bytes with encoding="bytes"."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self: Any, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def cifar_pixels(part: int, rows: int = 10) -> np.ndarray:
    return np.random.default_rng(part).integers(0, 256, (rows, 3072)).astype(np.uint8)


def cifar_files(name: str = "cifar10") -> dict[str, bytes]:
    """The batches of a small CIFAR-10 (10 images each) or CIFAR-100 (200 and 100 images)."""
    if name == "cifar100":
        fine = {"train": list(range(100)) * 2, "test": list(range(100))}
        files = {
            part: dump({"data": cifar_pixels(0, len(labels)), "fine_labels": labels, "coarse_labels": labels})
            for part, labels in fine.items()
        }
        return {**files, "meta": dump({"fine_label_names": [f"fine{i}" for i in range(100)]})}
    parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {
        part: dump({"batch_label": part, "labels": list(range(10)), "data": cifar_pixels(i), "filenames": ["x.png"]})
        for i, part in enumerate(parts)
    }
    return {**files, "batches.meta": dump({"label_names": [f"name{i}" for i in range(10)], "num_vis": 3072})}


def pack(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-py", mode: str = "w:gz") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


class Evil:
    """A pickle that runs a command when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


# What loads.


def test_digits_are_split_by_class() -> None:
    data = load_data("digits")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1293, 144, 360]
    assert data.train.images.shape == (1293, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.max() == 255
    assert data.class_names == tuple("0123456789")
    assert data.warnings == ()
    for part in (data.train, data.validation, data.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert ((shares - 0.1).abs() < 0.015).all()
    everything = torch.cat([p.images.flatten(1) for p in (data.train, data.validation, data.test)])
    assert len(everything) == 1797
    assert len(everything.unique(dim=0)) == 1797  # no image stands in two splits


def test_splits_are_the_same_every_time() -> None:
    first, second = load_data("digits"), load_data("digits")
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.validation.labels, second.validation.labels)
    assert first.digest == second.digest


def test_settings_choose_the_samples() -> None:
    whole, part = load_data("digits"), load_data("digits", train_samples=100)
    assert torch.equal(part.train.images, whole.train.images[:100])
    assert torch.equal(part.validation.images, whole.validation.images)
    assert len(load_data("digits", validation=0.25).validation) == 360
    inverted = load_data("digits", invert=True)
    assert torch.equal(inverted.test.images, 255 - whole.test.images)
    for settings, message in (
        ({"train_samples": 5000}, r"train_samples \(5000\) must be at most 1293"),
        ({"validation": 0.0001}, "does not split"),
        ({"validation": 1.0}, "validation"),
        ({"splits": 3}, "unknown setting 'splits'"),
    ):
        with pytest.raises(UserError, match=message):
            load_data("digits", **settings)


def test_mean_and_deviation_are_of_the_training_images() -> None:
    data = load_data("fake")
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), rel=1e-9)
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_an_unknown_set_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown dataset 'digit'; did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(UserError, match="no data folder 'nowhere'"):
        load_data("mnist", "nowhere")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", [".", "mnist/raw", "mnist", "MNIST/raw", "raw"])
def test_mnist_files_load_as_they_lie(root: Path, layout: str, zipped: bool) -> None:
    write_mnist(root / layout, zipped)
    protect(root)
    before = digest(root)
    data = load_data("mnist", str(root), validation=0.25)
    images, _, test_images, test_labels = mnist_arrays()
    assert data.train.images.shape == (30, 1, 28, 28)
    assert np.array_equal(data.test.images.squeeze(1).numpy(), test_images)
    assert np.array_equal(data.test.labels.numpy(), test_labels)
    known = {image.astype(np.uint8).tobytes(): i % 10 for i, image in enumerate(images)}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert known[image.numpy().tobytes()] == label
    assert len(data.warnings) == (4 if zipped else 0)
    assert digest(root) == before


@pytest.mark.parametrize("layout", ["fashion-mnist/raw", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_not_taken_for_mnist(root: Path, layout: str, offline: None) -> None:
    write_mnist(root / layout)
    data = load_data("fashion-mnist", str(root), validation=0.25)
    assert data.class_names[0] == "T-shirt/top"
    assert len(data.class_names) == 10
    with pytest.raises(UserError, match="could not be downloaded"):
        load_data("mnist", str(root))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", [".", "cifar10", "CIFAR10"])
def test_cifar10_files_load_as_they_lie(root: Path, layout: str, packed: bool) -> None:
    files = cifar_files()
    if packed:
        pack(root / layout / "cifar-10-python.tar.gz", files)
    else:
        unpack(root / layout / "cifar-10-batches-py", files)
    protect(root)
    before = digest(root)
    data = load_data("cifar10", str(root), validation=0.2)
    assert data.train.images.shape == (40, 3, 32, 32)
    assert len(data.validation) == 10
    assert data.class_names[3] == "name3"
    assert np.array_equal(data.test.images.numpy(), cifar_pixels(5).reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == list(range(10))
    known = {row.tobytes(): i for part in range(5) for i, row in enumerate(cifar_pixels(part))}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert known[image.numpy().tobytes()] == label
    assert [("not the official archive" in w) for w in data.warnings] == [True] * packed
    assert digest(root) == before


def test_cifar100_has_its_fine_classes(root: Path) -> None:
    pack(root / "cifar100" / "cifar-100-python.tar.gz", cifar_files("cifar100"), "cifar-100-python")
    data = load_data("cifar100", str(root), validation=0.5)
    assert data.class_names[42] == "fine42"
    assert data.test.labels.tolist() == list(range(100))
    assert torch.bincount(data.train.labels).tolist() == [1] * 100


def test_the_environment_names_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(root)
    monkeypatch.setenv("VITCMP_DATA", str(root))
    assert len(load_data("mnist", validation=0.25).test) == COUNT


def test_the_digest_is_of_the_files(root: Path) -> None:
    write_mnist(root)
    before = load_data("mnist", str(root), validation=0.25).digest
    arrays = mnist_arrays()
    (root / f"{IDX[0]}.gz").write_bytes(gzip.compress(idx(255 - arrays[0])))
    assert load_data("mnist", str(root), validation=0.25).digest != before


# What does not.


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("part", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_is_refused_and_not_run(root: Path, tmp_path: Path, packed: bool, part: str) -> None:
    proof = tmp_path / "proof"
    evil = pickle.dumps({b"data": Evil(proof), b"label_names": Evil(proof)}, protocol=2)
    pickle.loads(evil)
    assert proof.exists()  # it does run where pickles are read without care
    proof.unlink()
    files = {**cifar_files(), part: evil}
    if packed:
        pack(root / "cifar-10-python.tar.gz", files)
    else:
        unpack(root / "cifar-10-batches-py", files)
    with pytest.raises(UserError, match=rf"{part} is damaged or no plain data \(it asks for posix\.system\)"):
        load_data("cifar10", str(root))
    assert not proof.exists()


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "numpy load", "torch load", "numpy.core.multiarray scalar"]
)
def test_a_pickle_may_ask_for_arrays_only(name: str) -> None:
    module, attribute = name.split()
    content = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(UserError, match=f"it asks for {module}.{attribute}"):
        datasets._unpickle("batch", content)


def test_damaged_archives_are_errors(root: Path) -> None:
    path = root / "cifar-10-python.tar.gz"
    pack(path, cifar_files())
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-20], bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz (is damaged|lacks)"):
            load_data("cifar10", str(root))


def test_an_archive_without_a_batch_is_an_error(root: Path) -> None:
    files = cifar_files()
    del files["data_batch_4"]
    pack(root / "cifar-10-python.tar.gz", files)
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz lacks data_batch_4"):
        load_data("cifar10", str(root))
    (root / "cifar-10-python.tar.gz").unlink()
    unpack(root / "cifar-10-batches-py", files)
    with pytest.raises(UserError, match="cifar10 lacks data_batch_4"):
        load_data("cifar10", str(root))


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("data_batch_2", b"\x80\x02]q\x00."),
        ("data_batch_2", dump({"labels": [1] * 10})),
        ("data_batch_2", dump({"labels": [1] * 10, "data": cifar_pixels(0)[:, :100]})),
        ("data_batch_2", dump({"labels": [1] * 9, "data": cifar_pixels(0)})),
        ("data_batch_2", dump({"labels": [10] * 10, "data": cifar_pixels(0)})),
        ("data_batch_2", b""),
        ("batches.meta", dump({"num_vis": 3072})),
        ("batches.meta", b"\x80\x02]q\x00."),
    ],
)
def test_batches_that_hold_something_else_are_errors(root: Path, part: str, content: bytes) -> None:
    pack(root / "cifar-10-python.tar.gz", {**cifar_files(), part: content})
    with pytest.raises(UserError, match="fetch"):
        load_data("cifar10", str(root), validation=0.2)


def test_damaged_idx_files_are_errors(root: Path) -> None:
    write_mnist(root)
    path = root / f"{IDX[0]}.gz"
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[100:400] = bytes(300)
    values = mnist_arrays()[0]
    contents = {
        "empty": b"", "no gzip": b"hello", "cut": whole[: len(whole) // 2], "broken": bytes(broken),
        "no magic": gzip.compress(b"\1" + idx(values)[1:]), "too short": gzip.compress(idx(values)[:-1]),
        "too long": gzip.compress(idx(values) + b"0"), "fewer": gzip.compress(idx(values[:-1])),
        "header alone": gzip.compress(idx(values)[:6]), "flat": gzip.compress(idx(values.reshape(-1))),
    }  # fmt: skip
    for what, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match="fetch") as caught:
            load_data("mnist", str(root), validation=0.25)
        assert "mnist" in str(caught.value) or IDX[0] in str(caught.value), what


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "cifar10"),
        ("cifar100", "cifar-100-python.tar.gz", "cifar100"),
        ("mnist", "train-images-idx3-ubyte.gz", "mnist/raw"),
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "fashion-mnist/raw"),
    ],
)
def test_offline_the_error_says_which_file_goes_where(
    root: Path, offline: None, name: str, file: str, folder: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_data(name, str(root))
    message = str(caught.value)
    assert f"put {file} from http" in message
    assert str(root / folder) in message
    assert "VITCMP_DATA" in message
    assert "\n" not in message
    assert not [p for p in root.rglob("*") if p.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_missing_set_in_a_read_only_folder_is_an_error(root: Path, offline: None) -> None:
    protect(root)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_data("cifar10", str(root))


def test_a_download_with_another_checksum_is_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "served" / "cifar-10-python.tar.gz", cifar_files())
    monkeypatch.setattr(datasets, "CIFAR_URL", (tmp_path / "served").as_uri() + "/")
    with pytest.raises(UserError, match="could not be downloaded"):
        load_data("cifar10", str(root))
    assert not [p for p in root.rglob("*") if p.is_file()]


# The real ones.


def test_the_real_mnist(data_dir: Path) -> None:
    data = load_data("mnist", str(data_dir))
    assert [len(p) for p in (data.train, data.validation, data.test)] == [54_000, 6_000, 10_000]
    assert torch.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.mean == pytest.approx([0.1307], abs=2e-3)
    assert data.warnings == ()


def test_the_real_cifar10(data_dir: Path) -> None:
    data = load_data("cifar10", str(data_dir))
    assert [len(p) for p in (data.train, data.validation, data.test)] == [45_000, 5_000, 10_000]
    for part, each in ((data.train, 4500), (data.validation, 500), (data.test, 1000)):
        assert torch.bincount(part.labels).tolist() == [each] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    if data.digest == datasets.CIFAR["cifar10"]["md5"]:
        assert data.warnings == ()
    else:
        assert all("not the official archive" in w and data.digest in w for w in data.warnings)


def test_protect_makes_read_only(root: Path) -> None:
    write_mnist(root)
    protect(root)
    assert not any(p.stat().st_mode & stat.S_IWUSR for p in [root, *root.rglob("*")])
