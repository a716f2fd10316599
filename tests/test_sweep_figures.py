import pytest

from pipelines.sweep_figures import approaches, parallel_coordinates, responses

RANGES = {"a.x": ("uniform", [0.0, 2.0]), "b.y": ("loguniform", [0.01, 1.0]), "c.z": ("choice", ["up", "down", 3])}


def trial(x, y, z, result, status="finished"):
    reports = [] if result is None else [{"loss": result, "other": -result}]
    return {"values": {"a.x": x, "b.y": y, "c.z": z}, "status": status, "reports": reports}


TRIALS = [
    trial(0.5, 0.1, "up", 2.0),
    trial(2.0, 1.0, 3, 1.0),
    trial(1.0, 0.01, "down", 3.0, "stopped"),
    trial(1.5, 0.5, "up", None, "failed"),
]


def test_a_line_passes_the_axes_at_its_values():
    axis = parallel_coordinates(TRIALS, RANGES, "loss").axes[0]
    heights = [list(line.get_ydata()) for line in axis.lines[:3]]  # the axes themselves follow
    assert heights == [
        pytest.approx([0.25, 0.5, 0.0, 0.5]),
        pytest.approx([1.0, 1.0, 1.0, 0.0]),
        pytest.approx([0.5, 0.0, 0.5, 1.0]),
    ]
    assert [line.get_linewidth() for line in axis.lines[:3]] == [1.2, 3, 1.2]
    assert [line.get_alpha() for line in axis.lines[:3]] == [1, 1, 0.3]


def test_responses_have_a_panel_per_figure_and_key(tmp_path):
    figure = responses(TRIALS, RANGES, ["loss", "absent", "other"])
    assert len(figure.axes) == 6
    points = figure.axes[1].collections[0].get_offsets()
    assert points.tolist() == [[0.1, 2.0], [1.0, 1.0], [0.01, 3.0]]
    assert figure.axes[1].get_xscale() == "log" and figure.axes[1].get_title(loc="right").endswith("-1.00")
    assert figure.axes[2].collections[0].get_offsets()[:, 0].tolist() == [0, 2, 1]
    figure.savefig(tmp_path / "responses.png")


def test_a_response_that_is_constant_has_no_rank_correlation():
    figure = responses([trial(0.5, 0.1, "up", 2.0), trial(1.0, 0.1, "up", 3.0)], RANGES, ["loss"])
    assert [axis.get_title(loc="right") for axis in figure.axes] == ["rank correlation +1.00", "", ""]


def test_a_sweep_without_figures_still_draws(tmp_path):
    for index, figure in enumerate((parallel_coordinates(TRIALS[3:], RANGES, "loss"), responses([], RANGES, ["loss"]))):
        figure.savefig(tmp_path / f"{index}.png")


@pytest.mark.parametrize("value", [-1.5, 0.0, 2.0])
def test_figures_that_are_all_the_same_still_draw(value, tmp_path):
    alike = [trial(0.5, 0.1, "up", value)]
    parallel_coordinates(alike, RANGES, "loss").savefig(tmp_path / "parallel.png")
    approaches([([1, 2], [0.9, 0.5], value)], key="k", target=0.4, log=False).savefig(tmp_path / "approaches.png")


def test_approaches_are_drawn_beside_their_target(tmp_path):
    figure = approaches([([1, 2], [0.9, 0.5], 0.1), ([1, 2], [0.8, 0.6], 0.1)], key="k", target=0.4, log=True)
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[0.9, 0.5], [0.8, 0.6], [0.4, 0.4]]
    figure.savefig(tmp_path / "approaches.png")
