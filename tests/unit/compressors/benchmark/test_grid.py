"""The grid and the order in which models take turns."""

from lrc.compressors.benchmark.grid import Mode, Point, Settings, default_modes, turn_order


def test_the_grid_has_every_combination_once() -> None:
    settings = Settings((Mode.EAGER, Mode.GRAPH), (1, 16, 1), (32, 64), tokens=8, repeats=3)
    assert settings.points() == [
        Point(mode, batch, prompt, 8)
        for mode in (Mode.EAGER, Mode.GRAPH)
        for batch in (1, 16)
        for prompt in (32, 64)
    ]


def test_dense_takes_the_first_and_the_last_turn() -> None:
    assert turn_order(3, dense=True) == [0, 1, 2, 0]
    assert turn_order(1, dense=True) == [0, 0]
    assert turn_order(3, dense=False) == [0, 1, 2]


def test_graphs_are_measured_by_default_only_on_a_gpu() -> None:
    assert default_modes("cpu") == (Mode.EAGER,)
    assert default_modes("cuda:1") == (Mode.EAGER, Mode.GRAPH)


def test_a_point_reads_as_a_title() -> None:
    assert str(Point(Mode.EAGER, 1, 1024, 1)) == "eager, batch 1, prompt 1,024, 1 new token"
