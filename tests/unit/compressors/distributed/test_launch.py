"""The device of each process, and launches that are refused."""

from pathlib import Path

import pytest
import torch

from lrc.compressors.distributed.launch import process_device
from lrc.compressors.distributed.watch import Watch
from lrc.configs.errors import RecipeError

VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_every_process_of_a_host_has_its_own_gpu():
    for requested in ("auto", "cuda"):
        assert process_device(requested, VARIABLES) == "cuda:1"
        assert process_device(requested, VARIABLES | {"LOCAL_RANK": "0"}) == "cuda:0"
    assert process_device("cpu", VARIABLES) == "cpu"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        ("cuda:1", {}, r"--device: must be auto, cpu or cuda for several processes, got 'cuda:1'"),
        (
            "auto",
            {"LOCAL_WORLD_SIZE": "3"},
            r"--nproc-per-node: 3 processes on this host, but .* 2",
        ),
        ("auto", {"MASTER_ADDR": ""}, r"WORLD_SIZE: says .* MASTER_ADDR is not set"),
        ("auto", {"LOCAL_RANK": "x"}, r"WORLD_SIZE: says .* unset WORLD_SIZE"),
        ("cpu", {"RANK": "4"}, r"RANK: must be below WORLD_SIZE, .* 4, got 4; unset"),
        ("cpu", {"WORLD_SIZE": "0", "RANK": "0"}, r"RANK: must be below WORLD_SIZE"),
    ],
)
def test_a_wrong_launch_is_refused(device, changes, message):
    with pytest.raises(RecipeError, match=message):
        process_device(device, VARIABLES | changes)


def test_a_released_lock_is_a_lost_process(tmp_path: Path):
    lost: list[int] = []
    watches = [Watch(tmp_path, rank, 3, lost.extend) for rank in range(3)]
    assert [watch.lost() for watch in watches] == [[], [], []]
    watches[1].release()
    assert [watch.lost() for watch in watches[::2]] == [[1], [1]]
