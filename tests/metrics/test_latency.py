"""The protocol, in simulation on recorded noise and for real.

The noise is that of `benchmarks/record_noise.py`: durations of constant work on two cores of a virtual machine, with
torch's threads (1 or 2), alone (quiet) or beside a program that computes half of the time (busy). What 1,000 runs each
with the default plan give: called different when equal, 5 % and 10 % slower, and rounds (median, 90th percentile).

    condition  call     equal   5 %      10 %     rounds
    quiet_1    5 ms     2.6 %   100 %    100 %    15, 36
    quiet_1    50 ms    2.4 %   100 %    100 %    15, 36
    quiet_2    5 ms     3.5 %   99.9 %   100 %    48, 200
    quiet_2    50 ms    2.0 %   98.5 %   100 %    36, 38
    busy_1     5 ms     2.5 %   100 %    100 %    15, 36
    busy_1     50 ms    2.6 %   100 %    100 %    15, 36
    busy_2     5 ms     2.7 %   99.6 %   99.5 %   115, 200
    busy_2     50 ms    2.0 %   36.3 %   45.9 %   21, 28

The last is the limit: where threads wait for a core that another program holds, two seconds of long calls do not
suffice to find a difference; what is called different still is.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from vitcmp.metrics import latency
from vitcmp.metrics.latency import Call, CellLost, Plan, Timer, instability, interleaved_ms, measure, noise_floor
from vitcmp.metrics.statistics import is_tie, paired_ratio

CPU = torch.device("cpu")
NOISE = np.load(Path(__file__).parent / "noise.npz")
RUNS = 1000
DEFAULT = Plan()


class Replay:
    """A machine that computes as unevenly as one did: work takes what it took there, from some moment on.

    Neighbouring samples share the noise, and a longer sample averages over more of it.
    """

    def __init__(self, condition: str, start: float, speed: Callable[[float], float] = lambda now: 1.0) -> None:
        self.piece_ms = float(NOISE[f"{condition}_ms"])
        self.ends = _ends(condition)
        self.place = start * len(self.ends)
        """Work done, in pieces of the recording."""
        self.now_ms = 0.0
        self.speed = speed

    def work(self, ms: float) -> float:
        """How long work that takes so many ms on a machine without noise takes now."""
        before = self._until(self.place)
        self.place += ms / self.piece_ms
        taken = (self._until(self.place) - before) * self.piece_ms / self.speed(self.now_ms / 1e3)
        self.now_ms += taken
        return taken

    def clock(self) -> float:
        return self.now_ms / 1e3

    def _until(self, place: float) -> float:
        laps, rest = divmod(place, len(self.ends))
        whole = int(rest)
        before = self.ends[whole - 1] if whole else 0.0
        return laps * self.ends[-1] + before + (rest - whole) * (self.ends[whole] - before)


@functools.cache
def _ends(condition: str) -> list[float]:
    return np.cumsum(NOISE[condition].astype(float)).tolist()


def compare(condition: str, ms: float, slower: float, run: int, plan: Plan = DEFAULT) -> tuple[bool, int]:
    """Whether B, which takes `slower` times as long as A, is called different, and after how many rounds of both."""
    machine = Replay(condition, start=np.random.default_rng(run).random())
    work = {"a": ms, "a again": ms, "b": slower * ms}
    samples = measure(lambda name: machine.work(work[name]), list(work), plan, seed=run, clock=machine.clock).samples
    floor = noise_floor(samples["a"], samples["a again"])
    return not is_tie(paired_ratio(samples["b"], samples["a"]), floor), min(map(len, samples.values()))


def called_different(condition: str, ms: float, slower: float) -> float:
    """The share of runs."""
    return float(np.mean([compare(condition, ms, slower, run)[0] for run in range(RUNS)]))


@pytest.mark.parametrize("condition", ["quiet_1", "quiet_2", "busy_1", "busy_2"])
@pytest.mark.parametrize("ms", [5.0, 50.0])
def test_equals_are_called_different_in_one_of_twenty_at_most(condition: str, ms: float) -> None:
    assert called_different(condition, ms, slower=1.0) <= binom.ppf(0.99, RUNS, 0.05) / RUNS


@pytest.mark.parametrize(
    ("condition", "ms"),
    [("quiet_1", 5.0), ("quiet_1", 50.0), ("quiet_2", 5.0), ("quiet_2", 50.0), ("busy_1", 5.0), ("busy_1", 50.0),
     ("busy_2", 5.0)],
)  # fmt: skip
def test_slow_downs_are_found(condition: str, ms: float) -> None:
    assert called_different(condition, ms, slower=1.05) >= 0.90
    assert called_different(condition, ms, slower=1.10) >= 0.99


def test_of_equals_none_is_told_from_the_quickest() -> None:
    """Which of 22 copies is the quickest is found by looking, so that the intervals must be wider."""
    found = 0
    for run in range(200):
        machine = Replay("quiet_1", start=np.random.default_rng(run).random())
        names = [str(i) for i in range(22)]
        samples = measure(
            lambda name, machine=machine: machine.work(5.0), [*names, "again"], DEFAULT, run, machine.clock
        ).samples
        quickest = min(names, key=lambda name: np.median(samples[name]))
        floor = noise_floor(samples["0"], samples["again"])
        ratios = [paired_ratio(samples[name], samples[quickest], 1 - 0.05 / 21) for name in names if name != quickest]
        found += not all(is_tie(ratio, floor) for ratio in ratios)
    assert found <= binom.ppf(0.99, 200, 0.05)


@pytest.mark.parametrize("rising", [0.2, -0.2])
def test_a_machine_that_changes_its_speed_by_a_fifth_ranks_alike(rising: float) -> None:
    work = {"a": 10.0, "b": 10.5, "c": 11.0, "d": 11.6}

    def run(seed: int, speed: Callable[[float], float]) -> tuple[Replay, dict[str, list[float]]]:
        machine = Replay("quiet_1", np.random.default_rng(seed).random(), speed)
        return machine, measure(lambda name: machine.work(work[name]), list(work), DEFAULT, seed, machine.clock).samples

    for seed in range(30):
        seconds = run(seed, lambda now: 1.0)[0].clock()
        _, samples = run(seed, lambda now, seconds=seconds: 1 + rising * min(1.0, now / seconds))  # type: ignore[misc]
        ratios = {name: paired_ratio(samples[name], samples["a"]).value for name in work}
        medians = {name: float(np.median(samples[name])) for name in work}
        assert sorted(ratios, key=ratios.__getitem__) == sorted(medians, key=medians.__getitem__) == list(work)
        assert medians["d"] / medians["a"] == pytest.approx(1.16, rel=0.02)
        assert ratios == pytest.approx({name: ms / work["a"] for name, ms in work.items()}, rel=0.02)


class Steady:
    """A machine without noise, and how its time went."""

    def __init__(self, ms: dict[str, float], lost_at: dict[str, int] | None = None) -> None:
        self.ms, self.lost_at = ms, lost_at or {}
        self.now = 0.0
        self.order: list[str] = []

    def sample(self, name: str) -> float:
        self.order.append(name)
        self.now += self.ms[name] / 1e3
        if self.order.count(name) == self.lost_at.get(name):
            raise CellLost("timeout", "no answer in 5 s")
        return self.ms[name]

    def clock(self) -> float:
        return self.now


def run_steady(machine: Steady, plan: Plan, seed: int = 0) -> latency.Measured:
    return measure(machine.sample, list(machine.ms), plan, seed, machine.clock)


def test_every_round_has_one_sample_of_each_in_a_new_order() -> None:
    machine = Steady({"a": 1.0, "b": 2.0, "c": 3.0})
    samples, lost = run_steady(machine, Plan(rounds=60, most_rounds=60))
    assert samples == {"a": [1.0] * 60, "b": [2.0] * 60, "c": [3.0] * 60}
    assert not lost
    rounds = [tuple(machine.order[i : i + 3]) for i in range(0, 180, 3)]
    assert all(set(names) == {"a", "b", "c"} for names in rounds)
    assert set(rounds) == set(itertools.permutations("abc"))
    again = Steady(machine.ms)
    run_steady(again, Plan(rounds=60, most_rounds=60), seed=1)
    assert again.order != machine.order


def test_a_steady_cell_ends_at_the_first_look() -> None:
    samples, _ = run_steady(Steady({"a": 1.0}), Plan())
    assert len(samples["a"]) == Plan().rounds


@pytest.mark.parametrize(("ms", "rounds"), [(100.0, 10), (300.0, 6), (5000.0, 6)])
def test_a_cell_ends_at_its_cap_of_seconds_but_has_the_fewest_samples(ms: float, rounds: int) -> None:
    samples, _ = run_steady(Steady({"slow": ms, "quick": 1.0}), Plan(max_seconds=0.95, fewest=6))
    assert len(samples["slow"]) == rounds
    assert len(samples["quick"]) == Plan().rounds


def test_all_cells_of_a_group_end_together() -> None:
    unsteady = itertools.cycle([1.0, 2.0])
    samples = measure(lambda name: 1.0 if name == "steady" else next(unsteady), ["steady", "not"], DEFAULT).samples
    assert len(samples["steady"]) == len(samples["not"]) == DEFAULT.most_rounds


def test_an_unsteady_cell_ends_at_the_most_rounds() -> None:
    ms = itertools.cycle([1.0, 2.0])
    samples = measure(lambda _: next(ms), ["a"], Plan(most_rounds=33, max_seconds=math.inf)).samples
    assert len(samples["a"]) == 33


def test_a_lost_cell_leaves_the_others_whole() -> None:
    samples, lost = run_steady(Steady({"a": 1.0, "b": 2.0, "c": 3.0}, lost_at={"b": 4}), Plan())
    assert samples == {"a": [1.0] * 15, "c": [3.0] * 15}
    assert (lost["b"].status, lost["b"].reason) == ("timeout", "no answer in 5 s")
    assert list(lost) == ["b"]


def test_instability_names_what_holds_and_a_cure() -> None:
    steady = [1.0, 1.01] * 30
    assert instability(steady, Plan()) == []
    [drift] = instability([1.0 + 0.003 * i for i in range(100)], Plan(settle=0.1))
    assert "drifted by +19%" in drift
    few = instability([1.0, 1.1, 0.9, 1.0, 1.05, 0.97], Plan())
    assert len(few) == 1
    assert "+-10.0% only" in few[0]
    assert "--max-seconds" in few[0]
    assert any("spread over 40%" in note for note in instability([1.0, 1.5] * 30, Plan(settle=1)))


def test_the_noise_floor_is_the_twins_difference() -> None:
    assert noise_floor([1.03, 2.06, 4.12], [1.0, 2.0, 4.0]) == pytest.approx(0.03)
    assert noise_floor([0.97] * 3, [1.0] * 3) == pytest.approx(0.03)


def test_a_call_shorter_than_the_clock_tells_is_repeated() -> None:
    calls: Counter[str] = Counter()
    timer = Timer(Call(lambda: calls.update(["run"]), prepare=lambda: calls.update(["prepare"])), CPU)
    before = Counter(calls)
    start = time.perf_counter()
    ms = timer.sample_ms()
    assert time.perf_counter() - start > latency.SHORTEST_S / 3
    assert calls["prepare"] - before["prepare"] == 1
    assert calls["run"] - before["run"] == timer.repeats > 100
    assert 0 < ms < 0.02


def test_preparing_is_not_timed_and_a_slow_call_is_not_repeated() -> None:
    timer = Timer(Call(lambda: time.sleep(0.005), prepare=lambda: time.sleep(0.03)), CPU)
    assert timer.repeats == 1
    assert min(timer.sample_ms() for _ in range(3)) == pytest.approx(5, abs=2)


def test_warm_up_goes_on_until_calls_last_alike() -> None:
    seconds = itertools.chain([0.05, 0.02, 0.01], itertools.repeat(0.004))
    taken: list[float] = []

    def run() -> None:
        taken.append(next(seconds))
        time.sleep(taken[-1])

    Timer(Call(run), CPU)
    assert taken[:6] == [0.05, 0.02, 0.01, 0.004, 0.004, 0.004]


def test_the_timer_agrees_with_torchs() -> None:
    """Interleaved, at best of five: programs beside this one may disturb either."""
    from torch.utils.benchmark import Timer as Reference

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(128, 128)
        ours, theirs = (
            Timer(Call(lambda: torch.softmax(x @ x, dim=-1)), CPU),
            Reference("softmax(x @ x, dim=-1)", globals={"x": x, "softmax": torch.softmax}),
        )
        differences = []
        for _ in range(5):
            pairs = [(ours.sample_ms(), theirs.timeit(ours.repeats).mean * 1e3) for _ in range(20)]
            mine, reference = np.median(pairs, axis=0)
            differences.append(abs(mine / reference - 1))
            if differences[-1] < 0.1:
                return
        pytest.fail(f"the medians differ by {min(differences):.0%} at best")
    finally:
        torch.set_num_threads(threads)


def test_interleaved_ms_takes_so_many_rounds() -> None:
    samples = interleaved_ms({"short": lambda: None, "long": lambda: time.sleep(0.003)}, rounds=4, device=CPU)
    assert [len(x) for x in samples.values()] == [4, 4]
    assert max(samples["short"]) < 1 < 3 <= min(samples["long"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cold_calls_on_cuda_take_time() -> None:
    device = torch.device("cuda")
    x = torch.randn(4 * 2**20 // 4, device=device)
    timer = Timer(Call(lambda: x.sum()), device)
    assert np.median([timer.cold_ms() for _ in range(20)]) > 0


def main() -> None:
    """Print the table of the simulation: `python tests/metrics/test_latency.py`."""
    print("condition  call   equal    5 %   10 %  rounds: median, 90th percentile")
    for condition, ms in itertools.product(("quiet_1", "quiet_2", "busy_1", "busy_2"), (5.0, 50.0)):
        found = [[compare(condition, ms, slower, run) for run in range(RUNS)] for slower in (1.0, 1.05, 1.10)]
        shares = "  ".join(f"{np.mean([different for different, _ in runs]):6.1%}" for runs in found)
        rounds = np.percentile([n for runs in found for _, n in runs], [50, 90])
        print(f"{condition:9} {ms:3.0f} ms {shares}  {rounds[0]:.0f}, {rounds[1]:.0f}")


if __name__ == "__main__":
    main()
