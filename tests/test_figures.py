import pytest

from pipelines.figures import (
    CELLS,
    LOSSES,
    PANELS,
    denoising_figure,
    frontier_figure,
    grpo_figure,
    nfe_figure,
    pretrain_figure,
    series,
)


def rounds(num=20):
    rows = [{"step": step, **{name: index + 0.01 * step for index, name in enumerate(PANELS)}, "seconds/rollout": 2.0}
            for step in range(1, num + 1)]
    for row in rows[4:]:
        row["seconds/generator"] = 3.0
    return rows


def titles(figure):
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_series_follow_each_metric_over_the_rounds_that_have_it():
    found = series([{"step": 1, "a": 5.0}, {"step": 2, "a": 6.0, "b": 7.0}])
    assert found == {"a": ([1, 2], [5.0, 6.0]), "b": ([2], [7.0])}


def test_every_panel_draws_the_metric_it_is_named_for(tmp_path):
    figure = grpo_figure(series(rounds()), targets={"reward_accuracy": (0.6, 0.8), "p_mask_unmask": (0.5,)})
    axes = titles(figure)
    assert set(axes) == {*PANELS.values(), "losses by task, nats", "seconds by phase"}
    assert list(axes[PANELS["kl"]].lines[0].get_ydata())[9] == 2.1
    assert [line.get_ydata()[0] for line in axes[PANELS["reward_accuracy"]].lines[1:]] == [0.6, 0.8]
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_a_phase_that_a_round_did_without_takes_no_time():
    areas = titles(grpo_figure(series(rounds(6))))["seconds by phase"].collections
    tops = [max(y for x, y in area.get_paths()[0].vertices if x == step) for area in areas for step in (1, 6)]
    assert tops == [2.0, 2.0, 2.0, 5.0]


def test_missing_series_are_said_to_be_missing(tmp_path):
    figure = grpo_figure({"kl": ([0, 1], [0.0, 0.1]), "seconds/a": ([0, 1], [1, 1])})
    silent = {title for title, axis in titles(figure).items() if any(t.get_text() == "not logged" for t in axis.texts)}
    assert silent == {*PANELS.values(), "losses by task, nats"} - {PANELS["kl"]}
    grpo_figure({}).savefig(tmp_path / "empty.png")


def test_the_frontier_draws_a_line_per_model_and_steps_in_order_of_temperature():
    common = {"remasking": "random", "sampler": False, "top_p": 1.0}
    rows = [{"model": model, "steps": steps, "temperature": heat, "entropy": 2 + heat, "judge_nll": steps + heat}
            | common for model in ("base", "final") for steps in (4, 8) for heat in (1.0, 0.5)]
    (axis,) = frontier_figure(rows, {"entropy": 2.5, "judge_nll": 1.0}).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["final, 8 steps"] == [[2.5, 8.5], [3.0, 9.0]] and lines["natural text"] == [[2.5, 1.0]]
    assert len(lines) == 5
    rows[0] |= {"sampler": True}
    labels = {line.get_label() for line in frontier_figure(rows, {"entropy": 2.5, "judge_nll": 1.0}).axes[0].lines}
    assert {"base, 4 steps, sampler True", "base, 4 steps, sampler False"} < labels


def words(axis):
    """The words of each cell, from left to right and from above."""
    cells = {}
    for text in axis.texts:
        x, y = text.get_position()
        cells.setdefault((int(y), int(x)), []).append(text.get_text())
    return [cells[place] for place in sorted(cells)]


def test_a_denoising_is_drawn_in_reading_order_by_step_and_critic(tmp_path):
    first = {"pieces": ["a", "$"] * 20, "steps": [0, 0, *[2, 1] * 19], "p_wrong": [k / 40 for k in range(40)]}
    second = {"pieces": ["\u21b5\n", "", " "], "steps": [0, 3, 1], "p_wrong": [0.9, 0.1, 0.2]}
    figure = denoising_figure([first, second], steps=3)
    one, two, bar = figure.axes
    assert words(one) == [["a"], ["$"], *[["a", "2"], ["$", "1"]] * 19]
    assert words(two) == [["\u21b5"], ["", "3"], [" ", "1"]]
    colours = [axis.collections[0].get_array() for axis in (one, two)]
    assert [colour.shape for colour in colours] == [(2, 32), (1, 32)]
    assert colours[0].mask.flatten().tolist() == [True] * 2 + [False] * 38 + [True] * 24  # the prompt, and no token
    assert colours[0].compressed().tolist() == first["p_wrong"][2:] and colours[1].compressed().tolist() == [0.1, 0.2]
    assert bar.get_ylabel() == "critic's P(wrong)" and one.collections[0].get_clim() == (0, 1)
    figure.savefig(tmp_path / "denoising.png")
    assert (tmp_path / "denoising.png").stat().st_size > 10_000


def test_a_denoising_without_a_critic_is_coloured_by_step_and_a_long_one_is_cut(tmp_path):
    steps = [0, *[1, 2, 3, 4, 4] * CELLS][: 2 * CELLS]
    text = {"pieces": [" $word$", "thing"] * CELLS, "steps": steps, "p_wrong": None}
    figure = denoising_figure([text], steps=4)
    axis, bar = figure.axes
    assert axis.collections[0].get_array().compressed().tolist() == text["steps"][1:CELLS]
    assert len(words(axis)) == CELLS and bar.get_ylabel() == "step" and axis.collections[0].get_clim() == (0, 4)
    figure.savefig(tmp_path / "denoising.png")  # dollars are no formula


def test_losses_by_task_are_lines_of_one_panel(tmp_path):
    rows = [{"step": step, "loss_unmask": 2.0 / step, "loss_critic": 0.5, "p_mask_unmask": 0.1 * step}
            for step in (1, 2, 3)]
    for figure in (grpo_figure(series(rows)), pretrain_figure(series(rows), target=0.4)):
        lines = {line.get_label(): list(line.get_ydata()) for line in titles(figure)["losses by task, nats"].lines}
        assert lines == {LOSSES["loss_unmask"]: [2.0, 1.0, 2 / 3], LOSSES["loss_critic"]: [0.5] * 3}
    axis = titles(figure)["p(MASK) at masked positions"]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3]) and axis.lines[1].get_ydata()[0] == 0.4
    figure.savefig(tmp_path / "pretrain.png")


def test_quality_against_cost_is_read_at_the_entropy_of_natural_text(tmp_path):
    rows = [{"model": "base", "steps": nfe, "nfe": nfe, "temperature": heat, "entropy": 1 + heat, "remasking": "random",
             "sampler": False, "top_p": 1.0, "judge_nll": 10 / nfe + heat} for nfe in (8, 2, 4) for heat in (1.0, 0.5)]
    rows += [{**rows[0], "nfe": 16, "entropy": 3.0}]  # no temperature below the entropy wanted
    (axis,) = nfe_figure(rows, {"entropy": 1.75, "judge_nll": 1.0}).axes
    assert axis.lines[0].get_xydata().tolist() == [[2, 5.75], [4, 3.25], [8, 2.0]] and len(axis.lines) == 2
    nfe_figure([], {"entropy": 1.75, "judge_nll": 1.0}).savefig(tmp_path / "none.png")
