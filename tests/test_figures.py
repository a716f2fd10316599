from pipelines.figures import grpo_figure


def history(rounds=20):
    steps = list(range(rounds))
    names = ["reward/mean", "reward/accuracy", "reward/band_low", "reward/band_high", "kl", "entropy",
             "mask_bias/bias", "mask_bias/signal", "mask_bias/target", "seconds/rollout", "seconds/generator"]
    return {name: (steps, [index + 0.01 * step for step in steps]) for index, name in enumerate(names)}


def visible(figure):
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}


def test_every_panel_draws_the_series_it_is_named_for(tmp_path):
    figure = grpo_figure(history())
    axes = visible(figure)
    assert len(axes) == 7
    assert axes["KL to the base, nats per action"].lines[0].get_ydata()[10] == 4.1
    assert [line.get_label() for line in axes["p(MASK)"].lines] == ["p(MASK), average", "target"]
    assert len(axes["seconds by phase"].collections) == 2
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_missing_series_are_said_to_be_missing():
    axes = visible(grpo_figure({"kl": ([0, 1], [0.0, 0.1]), "seconds/a": ([0, 1], [1, 1]), "seconds/b": ([1], [2])}))
    silent = {title for title, axis in axes.items() if any(t.get_text() == "not logged" for t in axis.texts)}
    assert silent == set(axes) - {"KL to the base, nats per action", "seconds by phase"}


def test_nothing_logged_still_gives_a_figure(tmp_path):
    grpo_figure({}).savefig(tmp_path / "empty.png")
