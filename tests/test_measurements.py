import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from actors.judge import Judge
from actors.pretrainer import causal_nll
from grpo.checkpoint import load_model, save_checkpoint, verify_checkpoint
from grpo.config import DataSection
from grpo.config_file import load_config, to_dict
from grpo.data import VALIDATION_WINDOWS_SEED, make_dataset, windows
from grpo.example_rewards import balanced_brackets, vowel_share
from grpo.model import GPT
from grpo.tokenizer import build_tokenizer
from pipelines.live_view import token_pieces
from pipelines.measurements import (
    Setting,
    check_enough,
    check_splits,
    fit_judge,
    follow_judge,
    judge_folder,
    judge_nll_gain,
    load_scorer,
    measure,
    measure_natural,
    weak_judge,
)

torch.set_num_threads(1)
TINY = ["data.block_size=32", "grpo.prompt_tokens=8", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "pretrain.batch_size=8", "pretrain.eval_rows=8", "pretrain.steps=2", "evaluation.samples=24",
        "evaluation.judge_steps=2", "evaluation.judge_layers=1", "evaluation.judge_width=16", "run.threads=1"]


def settings(*overrides):
    return load_config("configs/tiny.yaml", [*TINY, *overrides])


def fitted_judge(config, dataset):
    for _ in fit_judge(config, dataset):
        pass
    return judge_folder(config, dataset)


def test_the_judge_and_all_models_lie_on_a_gpu_where_there_is_one(monkeypatch, tmp_path):
    config = settings(f"run.cache={tmp_path}")
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all." for n in range(400)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    model, devices = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size), []
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=dataset.tokenizer)

    def made(*_, device, **__):
        devices.append(device)
        return SimpleNamespace(eval=lambda: model, train=lambda: (), model=model, dataset=dataset, config=config)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("load_model", "load_remasking_model", "Judge"):
        monkeypatch.setattr(f"pipelines.measurements.{name}", made)
    Setting(config, dataset.folder, fitted_judge(config, dataset.folder), tmp_path / "model")
    assert devices == ["cuda"] * 4  # the judge that trains; then the judge, the generator and its re-masking model


@pytest.mark.parametrize("device, written", [("cpu", [None]), ("cuda", [1, None])])
def test_a_gpu_writes_a_text_before_the_clock_starts(monkeypatch, device, written):
    rows, asked = torch.zeros(2, 4, dtype=torch.int64), []
    setting = SimpleNamespace(device=device, mask=rows[:, 1:] == 0, start=1, natural=None, places=None,
                              data=SimpleNamespace(tokenizer=SimpleNamespace(decode=str)), report=lambda *_: {},
                              texts=lambda temperature, num=None: asked.append(num) or rows[:num])
    monkeypatch.setattr("pipelines.measurements.Setting", lambda *_, **__: setting)
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(asked)))
    row = measure(settings(), None, None, None, bound=False)
    assert asked == written and row["tokens_per_s"] == 6  # the clock counts calls: one
    assert len(row["samples"]) == 2


@pytest.mark.parametrize("kind", ["critic", "no critic", "causal"])
def test_the_watched_texts_are_the_first_of_those_measured(tmp_path, kind):
    config = settings("data.layout=documents", "denoise.steps=3", f"model.critic={str(kind == 'critic').lower()}")
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all."[: 12 + n % 30] for n in range(400)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    torch.manual_seed(0)
    shape = config.model
    if kind == "causal":
        shape = replace(shape, attention="causal", sampler=False)
    model = GPT(shape, dataset.vocabulary, block_size=config.data.block_size).eval()
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=dataset.tokenizer)
    row = measure(config, dataset.folder, tmp_path / "model", tmp_path / "model", bound=False, watched=2)
    if kind == "causal":
        assert row["denoising"] == []
        return
    setting = Setting(config, dataset.folder, tmp_path / "model", tmp_path / "model")
    texts, real = setting.texts(1.0)[:2], setting.natural.attention_mask[:2]
    assert len(row["denoising"]) == 2 and not real.all()
    for text, mask, found in zip(texts, real, row["denoising"], strict=True):
        assert found["pieces"] == token_pieces(text[mask].tolist(), dataset.tokenizer)
        assert found["steps"][:8] == [0] * 8 and set(found["steps"][8:]) <= {1, 2, 3}
        assert len(found["steps"]) == mask.sum()
        if kind == "critic":
            alone = model.critic_scores(text[mask][None]).sigmoid()[0]
            assert found["p_wrong"] == pytest.approx(alone.tolist(), abs=1e-5)
        else:
            assert found["p_wrong"] is None


def test_a_judge_is_found_again_by_runs_of_other_settings(tmp_path):
    config = settings()
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data").folder
    others = (["pretrain.learning_rate=1e-4", "pretrain.batch_size=4", "pretrain.log_every=3", "run.seed=2"],
              ["pretrain.warmup=7", "model.position=learned", "model.bias=true"])
    assert {fitted_judge(settings(*other), dataset) for other in others} == {fitted_judge(config, dataset)}
    assert fitted_judge(settings("evaluation.judge_steps=3"), dataset) != fitted_judge(config, dataset)


def test_runs_that_start_together_train_one_judge(monkeypatch, tmp_path):
    config, trained = settings(), []
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data").folder

    class Slow(Judge):
        def train(self):
            trained.append(self)
            time.sleep(0.5)
            yield from super().train()

    monkeypatch.setattr("pipelines.measurements.Judge", Slow)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: fitted_judge(config, dataset), range(3)))
    assert len(trained) == 1 and len(set(folders)) == 1


@pytest.mark.ray
@pytest.mark.parametrize("steps, told", [(3, [1, 2, 3]), (250, [*range(3, 250, 3), 250])])
def test_a_judge_shows_how_far_it_is_and_one_that_is_there_nothing(ray_session, tmp_path, steps, told):
    import ray

    config, shown = settings(f"evaluation.judge_steps={steps}"), []
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data").folder
    display = SimpleNamespace(note=lambda text: None, phase=lambda *moved: shown.append(moved))
    for _ in range(2):
        follow_judge(ray.remote(fit_judge).remote(config, dataset), display)
        verify_checkpoint(judge_folder(config, dataset))
    assert shown == [("judge", done, steps) for done in told]


def test_a_frozen_scorer_is_one_more_figure(tmp_path):
    config = settings("data.layout=documents", f"evaluation.scorer={tmp_path / 'scorer'}")
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all."[: 12 + n % 30] for n in range(400)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    torch.manual_seed(0)
    for mode in ("sequence_scorer", "generator"):
        model = GPT(config.model, dataset.vocabulary, mode=mode, block_size=config.data.block_size).eval()
        save_checkpoint(tmp_path / mode, model, config=to_dict(config), tokenizer=dataset.tokenizer)
    (tmp_path / "sequence_scorer").rename(tmp_path / "scorer")
    scorer = load_model(tmp_path / "scorer").eval()
    row = measure_natural(config, dataset.folder, tmp_path / "generator")
    natural = windows(dataset, "validation", config.evaluation.samples, config.data.block_size, VALIDATION_WINDOWS_SEED)
    assert not natural.attention_mask.all()
    alone = []
    for tokens, real in zip(natural.tokens, natural.attention_mask, strict=True):
        hidden = scorer.encode(tokens[real][None])
        alone.append(float(scorer.heads["scorer"](hidden, torch.arange(int(real.sum()))[None] >= 8)))
    assert row["scorer"] == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    with pytest.raises(ValueError, match="^evaluation.scorer must be a model of mode sequence_scorer, got 'lang"):
        load_scorer(str(tmp_path / "generator"), dataset.tokenizer)
    with pytest.raises(ValueError, match="^evaluation.scorer .*reads other tokens than the data"):
        load_scorer(str(tmp_path / "scorer"), build_tokenizer("bpe:300", documents * 3))


def test_measurements_that_run_at_once_share_the_cores_out(monkeypatch, tmp_path):
    config = settings("run.threads=0")
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data")
    judge = fitted_judge(config, dataset.folder)
    assert judge.parent == tmp_path  # beside the data, from whatever folder the task runs in
    monkeypatch.setattr("actors.torch_setup._cores", lambda: 8)
    try:
        for neighbors, threads in ((2, 4), (3, 2), (20, 1)):
            Setting(config, dataset.folder, judge, None, neighbors=neighbors)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layout", ["blocks", "documents"])
def test_the_users_rewards_are_those_of_completions_without_prompts_and_pads(tmp_path, layout):
    names = ["grpo.example_rewards:vowel_share", "grpo.example_rewards:balanced_brackets"]
    config = settings(f'grpo.rewards={{"{names[0]}": 1.0, "{names[1]}": 0.0}}', f"data.layout={layout}")
    documents = [f"{n} bottles (and {n * n} more" + ")" * (n % 2) for n in range(600)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    row = measure_natural(config, dataset.folder, fitted_judge(config, dataset.folder))
    natural = windows(dataset, "validation", 24, 32, VALIDATION_WINDOWS_SEED)
    rows = zip(natural.tokens[:, 8:].tolist(), natural.attention_mask[:, 8:].tolist(), strict=True)
    texts = [bytes(t for t, real in zip(tokens, mask, strict=True) if real).decode() for tokens, mask in rows]
    for name, reward in zip(names, (vowel_share, balanced_brackets), strict=True):
        assert row[f"rewards/{name.replace(':', '.')}"] == pytest.approx(sum(reward(texts)) / 24, rel=1e-6)


def test_documents_that_end_with_the_prompt_are_said_before_anything_trains(tmp_path):
    dataset = make_dataset([f"{n:06d}" for n in range(600)], settings("data.layout=documents").data, tmp_path / "data")
    with pytest.raises(ValueError, match=r"prompt_tokens must be at least 4 below the longest .*\(6 tokens, .*got 8"):
        check_enough(settings("data.layout=documents"), dataset.folder)
    check_enough(settings("data.layout=documents", "grpo.prompt_tokens=2"), dataset.folder)


def test_a_model_is_not_measured_on_text_that_it_was_trained_on(tmp_path):
    tokenizer = build_tokenizer("bytes")
    config = settings("data.source=mine.txt", "data.judge_fraction=0")
    model = GPT(config.model, tokenizer.vocabulary, block_size=config.data.block_size)
    folder = save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=tokenizer)
    other = DataSection(source="another.txt")
    text = lambda held_out, *sources: SimpleNamespace(provenance={"sources": list(sources), "held_out": held_out})  # noqa: E731
    check_splits(folder, config.data, text("x", "a"), "--base")
    check_splits(folder, other, text("x", "a"), "--base")
    told = r"^--base .*model was trained with data.judge_fraction 0.0 on this source, got 0.25, which splits"
    with pytest.raises(ValueError, match=told):
        check_splits(folder, DataSection(source="mine.txt"), text("x", "a"), "--base")
    with pytest.raises(ValueError, match="data.split_seed 0 on this source, got 3"):
        check_splits(folder, replace(config.data, split_seed=3), text("x", "a"), "--base")
    known = text("x", "a", "b").provenance
    save_checkpoint(folder, model, config=to_dict(config), tokenizer=tokenizer, provenance=[known])
    check_splits(folder, replace(config.data, source="/data/mine.txt"), text("x", "a", "b"), "--base")
    check_splits(folder, DataSection(source="mine.txt"), text("y", "c"), "--base")  # of the same name, and other text
    with pytest.raises(ValueError, match=told):
        check_splits(folder, other, text("y", "a", "b"), "--base")  # of another name, and the same text
    with pytest.raises(ValueError, match="on other splits of this source: it may know the text"):
        check_splits(folder, config.data, text("y", "a", "b"), "--base")
    save_checkpoint(folder, model, config=to_dict(config), provenance=[known, text("z", "c").provenance])
    check_splits(folder, config.data, text("z", "c"), "--base")
    with pytest.raises(ValueError, match="on other splits of this source: it may know the text"):
        check_splits(folder, config.data, text("y", "a", "b"), "--base")  # the text of its base, split otherwise
    with pytest.raises(ValueError, match="was trained on some of the files of data.source mine.txt.*other splits"):
        check_splits(folder, config.data, text("y", "a", "b", "c"), "--base")


@pytest.mark.parametrize("change, same", [
    ("data.block_size=64", True), ("data.block_size=48", False), ("data.layout=documents", False),
    ('data.separator="\\n"', False), ("data.split_seed=1", False), ("data.judge_fraction=0.3", False),
])
def test_what_was_held_out_decides_whether_two_splits_are_the_same(change, same, tmp_path):
    text = ["\n".join(f"line {n} of document {d}" for n in range(40)) for d in range(400)]
    config, changed = settings("data.source=mine.txt"), settings("data.source=mine.txt", change)
    assert config.data.block_size == 32
    dataset, other = (make_dataset(text, c.data, tmp_path / f"data-{i}") for i, c in enumerate((config, changed)))
    model = GPT(config.model, dataset.vocabulary, block_size=32)
    folder = save_checkpoint(tmp_path / "model", model, config=to_dict(config), provenance=[dataset.provenance])
    if same:
        check_splits(folder, changed.data, other, "--base")
        return
    key, value = change.split("=")
    with pytest.raises(ValueError, match=f"was trained with {key} .* on this source, got .*, which splits it"):
        check_splits(folder, changed.data, other, "--base")


def test_a_judge_that_knows_the_data_less_well_than_the_generator_is_told(tmp_path):
    config = settings()
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data")
    judge = fitted_judge(config, dataset.folder)
    rows = windows(dataset, "validation", 8, 32, VALIDATION_WINDOWS_SEED)
    nats, _ = causal_nll(load_model(judge).eval(), rows)
    found = measure_natural(config, dataset.folder, judge)["judge_bpb"]
    assert found == pytest.approx(float(nats) / math.log(2), rel=1e-6)  # a token is a byte
    assert weak_judge(found, found) == "" and weak_judge(2.25, 2.0) == (
        "the judge knows the data less well (2.250 bits/byte) than the generator (2.000 at most): "
        "evaluation.judge_steps, evaluation.judge_layers and evaluation.judge_width make it a better one")


def test_a_gain_is_told_only_at_equal_token_entropy():
    rows = {"final": {"judge_nll": 2.0, "entropy": 2.0}}
    for error, gain in ((0.0, 0.5), (-0.019, 0.5), (0.021, None), (-0.021, None)):
        rows["base_matched"] = {"judge_nll": 2.5, "entropy": 2.0 + error, "entropy_error": error}
        assert judge_nll_gain(rows) == gain


def test_a_row_tells_how_far_it_is_from_the_entropy_to_match(tmp_path):
    config = settings()
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data")
    torch.manual_seed(0)
    model = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size).eval()
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=dataset.tokenizer)
    judge = fitted_judge(config, dataset.folder)
    row = measure(config, dataset.folder, judge, tmp_path / "model", 0.5, bound=False)
    assert row["entropy_error"] == row["entropy"] - 0.5 > 0.1 and row["temperature"] < 1
    assert "entropy_error" not in measure(config, dataset.folder, judge, tmp_path / "model", bound=False)
