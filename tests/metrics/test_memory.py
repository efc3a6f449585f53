"""Peak memory and its limit, in processes of their own: what a process freed before, it uses again unseen."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp import machine
from vitcmp.configs import BenchConfig, resolve_run
from vitcmp.metrics import memory
from vitcmp.metrics.memory import PeakMemory
from vitcmp.metrics.workload import MemoryStation
from vitcmp.workflows.bench import cells_of

CPU = torch.device("cpu")
MIB = 2**18
"""Numbers in fp32."""
KNOWN = PeakMemory(CPU).mib() is not None
knows = pytest.mark.skipif(not KNOWN, reason="this system does not tell a process's peak memory")

MEASURE = """
import torch
from vitcmp.metrics.memory import PeakMemory

torch.ones(2**20).add(1)
before = torch.ones(300 * 2**18)
del before
peak = PeakMemory(torch.device("cpu"))
kept = torch.ones(16 * 2**18)
for mib in {mib}:
    torch.ones(mib * 2**18)
print(peak.mib())
"""


@knows
@pytest.mark.parametrize(("mib", "wanted"), [((128, 64), 144), ((32, 32, 32), 48)])
def test_the_peak_is_that_of_what_was_held_at_once(mib: tuple[int, ...], wanted: int) -> None:
    code = MEASURE.format(mib=mib)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(wanted, abs=8)


def test_other_devices_are_unknown() -> None:
    peak = PeakMemory(torch.device("mps"))
    assert peak.mib() is None
    assert peak.held_mib() is None
    with pytest.raises(memory.NotKnown, match="does not tell"), memory.exact_peak(torch.device("mps")):
        pass


def in_child(context: Any, task: Callable[..., Any], *args: object) -> Any:
    """What the task returns in a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, task, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def answer(sender: Any, task: Callable[..., Any], *args: object) -> None:
    sender.send(task(*args))


@pytest.fixture(scope="module")
def fork() -> Any:
    return machine.process_context(CPU, preload="vitcmp.metrics.memory")


@pytest.fixture(scope="module")
def big_parent(fork: Any) -> Iterator[None]:
    """A parent that once had 2 GiB, and holds 1 GiB, touched."""
    in_child(fork, int)  # the server may be of that time, or of before
    once = torch.ones(2048 * MIB)
    del once
    held = torch.ones(1024 * MIB)
    yield
    assert held[-1] == 1


def allocate(mib: int, before: int = 0) -> dict[str, float | None]:
    """Memory of a call that allocates so much, in a process that allocated and freed `before`."""
    memory.return_freed_memory()
    torch.ones(MIB).add_(1)
    torch.ones(before * MIB)
    return memory.measure_memory(CPU, lambda: torch.ones(mib * MIB))


def exact_after_keeping(mib: int, threads: int) -> tuple[list[float | None], list[float | None]]:
    """Readings of a known allocation, by `exact_peak` and by a plain reading, in a process that keeps what it frees.

    With threads, one of theirs allocates as well, from a heap of its own.
    """
    machine.keep_freed_memory()
    with ThreadPoolExecutor(max(1, threads)) as pool:

        def call(mib: int) -> None:
            half = [torch.ones(MIB) for _ in range(mib // 2)]
            if threads:
                pool.submit(lambda: [torch.ones(MIB) for _ in range(mib // 2)]).result()
            torch.ones(mib * MIB - len(half) * MIB)

        readings: tuple[list[float | None], list[float | None]] = [], []
        for _ in range(3):
            plain = PeakMemory(CPU)
            call(mib)
            readings[1].append(plain.mib())
            with memory.exact_peak(CPU, pool if threads else None, threads) as exact:
                call(mib)
                readings[0].append(exact.mib())
            machine.keep_freed_memory()
            call(2 * mib)
    return readings


@knows
@pytest.mark.parametrize("threads", [0, 2])
def test_an_exact_peak_is_that_of_what_is_held_in_a_process_that_keeps_what_it_frees(fork: Any, threads: int) -> None:
    exact, plain = in_child(fork, exact_after_keeping, 64, threads)
    assert exact == [pytest.approx(64, rel=0.05)] * 3
    assert min(plain) < 48, "a plain reading does not see what is used again"


def taken_and_given_back(mib: int) -> tuple[float, float]:
    """Growth of the resident memory while free places are taken, and after."""
    machine.keep_freed_memory()
    torch.ones(mib * MIB)
    start = PeakMemory(CPU)
    with memory.exact_peak(CPU):
        inside = start.held_mib()
    return inside, start.held_mib()


@knows
def test_places_that_are_taken_hold_no_memory(fork: Any) -> None:
    for held in in_child(fork, taken_and_given_back, 256):
        assert -300 < held < 4


SIZES = [64, 128, 256, 512, 1024]


@knows
@pytest.mark.parametrize("mib", SIZES)
def test_a_known_allocation(fork: Any, mib: int) -> None:
    assert in_child(fork, allocate, mib) == {"peak_memory_mib": pytest.approx(mib, rel=0.05)}


@knows
@pytest.mark.parametrize("mib", SIZES)
def test_a_known_allocation_whatever_the_parent_holds(fork: Any, big_parent: None, mib: int) -> None:
    assert in_child(fork, allocate, mib) == {"peak_memory_mib": pytest.approx(mib, rel=0.05)}


@knows
@pytest.mark.parametrize("mib", [64, 1024])
def test_what_the_child_freed_is_not_used_again_unseen(fork: Any, mib: int) -> None:
    assert in_child(fork, allocate, mib, 1024) == {"peak_memory_mib": pytest.approx(mib, rel=0.05)}
    assert in_child(fork, allocate_in_pieces, mib) == {"peak_memory_mib": pytest.approx(mib, rel=0.05)}


def allocate_in_pieces(mib: int) -> dict[str, float | None]:
    """In what comes from the heap, not from mappings of its own."""

    def call() -> None:
        [torch.ones(MIB // 64) for _ in range(64 * mib)]

    memory.return_freed_memory()
    call()
    return memory.measure_memory(CPU, call)


def station_memory() -> dict[str, float | None]:
    bench = BenchConfig(level="core", mode="train-step", tokens=1024, batch_size=4)
    model = replace(resolve_run({"dataset": "fake"}).model, pool="mean", dim=512, num_heads=8)
    (cell,) = cells_of(["agent:conv_kernel_size=0"], model, bench)
    return MemoryStation("cpu", 2, 4096).memory(cell)


@knows
def test_what_a_warm_up_freed_does_not_count() -> None:
    found = in_child(multiprocessing.get_context("spawn"), station_memory)
    per_agent = 8 * 49 * 4 / 2**20  # MiB of a number for each of 8 heads and 49 agents
    held = 2 * 1024 + 4 * 1024 + 2 * 4 * 64  # two biases, four images' weights, what agents are and what they collected
    assert found["inference_memory_mib"] == pytest.approx(held * per_agent + 8, rel=0.08)  # and the result


def model_memory(spec: str, precision: str) -> float | None:
    bench = BenchConfig(level="model", tokens=64, batch_size=64, precision=precision)
    (cell,) = cells_of([spec], resolve_run({"dataset": "fake"}).model, bench)
    return MemoryStation("cpu", 1, 4096).memory(cell)["peak_memory_mib"]


@knows
@pytest.mark.parametrize("spec", ["performer", "cosformer"])
def test_kernels_that_a_larger_batch_loads_do_not_count(spec: str) -> None:
    """A hundred MiB of compiler: the model's kernels begin with more numbers than one image has, these cores have none.

    And features, computed in fp32 at least, take no more memory in bf16.
    """
    spawn = multiprocessing.get_context("spawn")
    in_fp32, in_bf16 = (in_child(spawn, model_memory, spec, precision) for precision in ("fp32", "bf16"))
    features = 64 * 8 * 65 * 64 * 4 / 2**20  # MiB of 64 features at most of 64 images' tokens in 8 heads
    assert in_fp32 < 2 * features
    assert in_bf16 < 3 * in_fp32


@knows
def test_a_known_allocation_in_a_child_that_starts_from_nothing() -> None:
    found = in_child(multiprocessing.get_context("spawn"), allocate, 64)
    assert found == {"peak_memory_mib": pytest.approx(64, rel=0.05)}


def gelu(x: Tensor) -> Tensor:
    """Keeps its input, which is there anyway."""
    return F.gelu(x)


def sigmoid_of_product(x: Tensor) -> Tensor:
    """Keeps its result, while the sigmoid's input is freed."""
    return (2 * x).sigmoid()


def three_exponentials(x: Tensor) -> Tensor:
    """Keeps all three results."""
    return x.exp().exp().exp()


def differentiate(function: Callable[[Tensor], Tensor], mib: int) -> dict[str, float | None]:
    def calls(size: int) -> tuple[Callable[[], object], Callable[[], Tensor], Callable[[Tensor], object]]:
        x = torch.full((size * MIB,), 0.1, requires_grad=True)

        def inference() -> None:
            with torch.inference_mode():
                function(x)

        return inference, lambda: function(x), lambda y: y.backward(torch.ones_like(y))

    memory.return_freed_memory()
    inference, forward, backward = calls(1)
    inference()
    backward(forward())
    return memory.measure_memory(CPU, *calls(mib))


@knows
@pytest.mark.parametrize(
    ("function", "inference", "activation", "peak"),
    # The peak: what is held, the result's gradient, and those before and after one function.
    [(gelu, 1, 1, 3), (sigmoid_of_product, 2, 1, 4), (three_exponentials, 2, 3, 6)],
)
def test_activations_are_told_apart(
    fork: Any, function: Callable[[Tensor], Tensor], inference: int, activation: int, peak: int
) -> None:
    found = in_child(fork, differentiate, function, 64)
    wanted = {"peak_memory_mib": peak, "inference_memory_mib": inference, "activation_memory_mib": activation}
    assert found == {name: pytest.approx(64 * times, rel=0.05) for name, times in wanted.items()}


def allocate_without_end(limit_mib: int) -> tuple[bool, int, bool]:
    """Whether the limit holds, MiB until the error, and whether that is known as one of memory."""
    holds, kept = memory.limit_memory(limit_mib), []
    try:
        for _ in range(100):
            kept.append(torch.ones(16 * MIB))
    except Exception as error:
        return holds, 16 * len(kept), machine.out_of_memory(error)
    return holds, 16 * len(kept), False


def bytes_without_end(limit_mib: int) -> bool:
    memory.limit_memory(limit_mib)
    try:
        bytearray(2 * limit_mib * 2**20)
    except Exception as error:
        return machine.out_of_memory(error)
    return False


def attention_without_end(limit_mib: int) -> bool:
    """Threads are started, libraries loaded and loops compiled within the limit."""
    from vitcmp import attention

    memory.limit_memory(limit_mib)
    torch.set_num_threads(2)
    block = attention.load("softmax:impl=naive").build(attention.LayerConfig(32, 2, attention.TokenGrid(64, 64)))
    try:
        block(torch.randn(2, 4096, 32)).sum().backward()
    except Exception as error:
        return machine.out_of_memory(error)
    return False


limits = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit of data")


@limits
def test_a_limit_turns_an_endless_allocation_into_an_error(fork: Any) -> None:
    holds, mib, known = in_child(fork, allocate_without_end, 512)
    assert holds
    assert 512 - 48 <= mib <= 512
    assert known


@limits
@pytest.mark.parametrize("task", [bytes_without_end, attention_without_end])
def test_others_errors_of_memory_are_known_too(fork: Any, task: Callable[[int], bool]) -> None:
    assert in_child(fork, task, 256)


@limits
def test_the_limit_is_half_of_what_there_is() -> None:
    total = next(int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x) / 1024
    assert 0 < memory.default_limit_mib() <= total / 2


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "9000"}, [4096, 9000]),
        ("0::/outside/the/container\n", {"memory.max": "4096"}, [4096]),
        ("0::/\n", {"memory.max": "max"}, []),
        ("3:cpu,cpuacct:/a\n2:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "77"}, [77]),
        ("5:memory,hugetlb:/a/b\n", {"memory/memory.limit_in_bytes": "77", "memory.max": "5"}, [77]),
        ("", {}, []),
    ],
)  # fmt: skip
def test_limits_of_containers(tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert memory._cgroup_limits(membership, tmp_path) == limits
