"""What is set and read of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitcmp import machine
from vitcmp.configs import UserError, usable_cores


@pytest.fixture
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_as_before")
def test_threads_are_set_left_or_refused() -> None:
    machine.set_threads(1)
    assert torch.get_num_threads() == 1
    machine.set_threads(None)
    assert torch.get_num_threads() == 1
    most = 4 * usable_cores()
    machine.set_threads(most)
    assert torch.get_num_threads() == most
    with pytest.raises(UserError, match=f"must be at most {most}"):
        machine.set_threads(most + 1)
    assert torch.get_num_threads() == most
