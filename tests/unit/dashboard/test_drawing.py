from api.dashboard.drawing import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, curve, heat


def test_heat_has_twenty_one_steps_and_stays_inside() -> None:
    assert [heat(score) for score in (-0.1, 0.0, 0.024, 0.026, 0.5, 1.0, 1.2)] == [0, 0, 0, 1, 10, 20, 20]


def test_a_curve_spans_the_plot_from_first_to_last_step() -> None:
    drawn = curve([(1, 2.0), (2, 1.0), (3, 1.5)], "loss")

    assert drawn is not None
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert drawn.line == (f"M{LEFT:.1f},{TOP:.1f} L{middle_x:.1f},{BOTTOM:.1f} L{RIGHT:.1f},{middle_y:.1f}")
    assert (drawn.top, drawn.bottom, drawn.last) == ("2", "1", "1.5")
    assert (drawn.last_x, drawn.last_y) == (RIGHT, middle_y)
    assert drawn.description == "loss from 2 at step 1 to 1.5 at step 3"


def test_a_flat_curve_runs_through_the_middle() -> None:
    drawn = curve([(1, 0.5), (9, 0.5)], "loss")

    assert drawn is not None
    assert drawn.line == f"M{LEFT:.1f},95.0 L{RIGHT:.1f},95.0"


def test_one_point_is_no_curve() -> None:
    assert curve([], "loss") is None
    assert curve([(1, 2.0)], "loss") is None


def test_a_long_run_is_thinned_but_its_newest_point_is_exact() -> None:
    points = [(step, 1.0 if step < 10_000 else 0.25) for step in range(1, 10_001)]

    drawn = curve(points, "loss")

    assert drawn is not None
    assert len(drawn.line.split()) <= MOST_POINTS
    assert (drawn.last_step, drawn.last) == (10_000, "0.25")
