"""Checkpoints come back equal to the bit, or not at all; what is missing or too much is named."""

import json
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from grpo import checkpoint as checkpoints
from grpo.checkpoint import (
    load_checkpoint,
    load_into,
    load_model,
    load_tokenizer,
    model_digest,
    save_checkpoint,
    write_manifest,
)
from grpo.config import Config, DataSection, GrpoSection, ModelSection, RewardSection
from grpo.config_file import to_dict
from grpo.gpt2 import load_gpt2
from grpo.model import GPT, text_logits
from grpo.run_checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    prune_checkpoints,
)
from grpo.text_generator import TextGenerator
from grpo.tokenizer import Vocabulary, build_tokenizer

torch.set_num_threads(1)
VOCABULARY = Vocabulary(30)
IDS = torch.arange(24).view(3, 8)


def make(seed=0, block_size=8, reward=None, mode="generator", **section):
    torch.manual_seed(seed)
    section = ModelSection(**{"n_layer": 2, "n_head": 2, "n_embd": 16, **section})
    return GPT(section, VOCABULARY, mode=mode, block_size=block_size, reward=reward)


def same_tensors(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())


def edit_description(folder, change):
    """Rewrite checkpoint.json as another version of the program would have written it."""
    path = folder / checkpoints.DESCRIPTION
    description = json.loads(path.read_text())
    change(description["architecture"])
    path.write_text(json.dumps(description))
    write_manifest(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["generator", "reward", "token_classifier", "sequence_scorer"])
def test_model_comes_back_to_the_bit_without_a_warning(tmp_path, mode, dtype, caplog):
    reward = RewardSection(layers=(1, -1), pooling="mean", hidden=12, spectral_norm=True)
    model = make(mode=mode, reward=reward, position="learned", bias=True).to(dtype)
    save_checkpoint(tmp_path / "one", model, config={"run": {"seed": 3}})
    again = load_model(tmp_path / "one")
    assert same_tensors(model.state_dict(), again.state_dict())
    assert torch.equal(again.eval()(IDS), model.eval()(IDS))
    assert load_checkpoint(tmp_path / "one").config == {"run": {"seed": 3}}
    assert not caplog.records


def test_untied_head_with_residual_over_a_bfloat16_trunk_comes_back(tmp_path):
    model = make()
    model.untie(20)
    nn.init.normal_(model.heads["lm"].residual[2].weight)
    nn.init.normal_(model.heads["lm"].matrix)
    model.trunk.to(torch.bfloat16)
    save_checkpoint(tmp_path / "one", model, config={})
    again = load_model(tmp_path / "one")
    assert same_tensors(model.state_dict(), again.state_dict())
    assert torch.equal(again(IDS), model(IDS))


def test_training_state_comes_back_to_the_bit(tmp_path):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS).square().mean().backward()
    optimizer.step()
    base = torch.randn(6)
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "floats": [0.1, 1e-308, math.inf, -0.0, 2**70],
        "views": (base[:3], base[2:], base[::2], torch.tensor(7), torch.zeros(0)),
        "nested": [{"phase": "reward", "none": None, "flag": True, 3: {"$tensor": "a user's own key"}}],
        "half": torch.randn(5).bfloat16(),
    }
    save_checkpoint(tmp_path / "one", model, config={}, state=state)
    again = load_checkpoint(tmp_path / "one").state

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        return type(a) is type(b) and repr(a) == repr(b)

    assert equal(state, again)
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fresh.load_state_dict(again["optimizer"])
    assert equal(fresh.state_dict(), optimizer.state_dict())


def test_state_that_cannot_be_saved_is_named_and_leaves_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="state.a.1 cannot be saved: object is no tensor"):
        save_checkpoint(tmp_path / "one", make(), config={}, state={"a": [1, object()]})
    assert not (tmp_path / "one").exists()


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    folder = save_checkpoint(tmp_path / "one", make(), config={}, state={"t": torch.ones(3)})
    for path in folder.rglob("*"):
        with pytest.raises((pickle.UnpicklingError, KeyError, ValueError, EOFError, AttributeError)):
            pickle.loads(path.read_bytes())


def test_tokenizer_travels_with_the_checkpoint(tmp_path):
    tokenizer = build_tokenizer("bytes")
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), tokenizer.vocabulary, block_size=8)
    save_checkpoint(tmp_path / "one", model, config={}, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "one").fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="the tokenizer bytes has 256 tokens, the model 30: save"):
        save_checkpoint(tmp_path / "one", make(), config={}, tokenizer=tokenizer)
    save_checkpoint(tmp_path / "one", make(), config={})
    with pytest.raises(ValueError, match="saved without a tokenizer"):
        load_tokenizer(tmp_path / "one")


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    save_checkpoint(tmp_path / "one", make(0), config={})
    second = make(1)
    save_checkpoint(tmp_path / "one", second, config={})
    assert same_tensors(load_model(tmp_path / "one").state_dict(), second.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_interrupted_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    first = make(0)
    save_checkpoint(checkpoint_folder(tmp_path, 1), first, config={})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_manifest", killed)
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(checkpoint_folder(tmp_path, step), make(1), config={})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert same_tensors(load_model(latest_checkpoint(tmp_path)).state_dict(), first.state_dict())
    prune_checkpoints(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


FILES = (checkpoints.MODEL, checkpoints.TRAINING, checkpoints.DESCRIPTION, checkpoints.MANIFEST)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoints_are_one_line_errors_and_are_passed_over(tmp_path, file, damage, caplog):
    for step in (9, 10, 11):
        save_checkpoint(checkpoint_folder(tmp_path, step), make(step), config={}, state={"t": torch.ones(9)})
    path = checkpoint_folder(tmp_path, 11) / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "truncate":
        path.write_bytes(content[:middle])
    elif damage == "flip":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    for load in (load_model, load_checkpoint):
        with pytest.raises(ValueError, match="step-00000011") as error:
            load(checkpoint_folder(tmp_path, 11))
        assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 10)
    assert len(caplog.records) == 1 and "step-00000011" in caplog.text


def test_a_model_s_digest_is_of_its_weights_tokens_shape_and_mask_bias_alone(tmp_path):
    def digest(model, bias=0.5, **config):
        return model_digest(save_checkpoint(tmp_path / "model", model, config=config,
                                            state={"mask_bias": {"bias": bias}, "step": len(config)}))

    model = make()
    assert digest(model) == digest(model, evaluation=1) == digest(make(), evaluation=2)
    assert len({digest(model), digest(model, bias=0.6), digest(make(seed=1)), digest(make(block_size=9))}) == 4


def test_whoever_may_read_a_checkpoints_description_may_read_its_weights(tmp_path):
    folder = save_checkpoint(tmp_path / "one", make(), config={})
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


def test_checkpoint_from_before_a_head_existed_names_it_as_fresh(tmp_path, caplog):
    model = make(critic=False)
    folder = save_checkpoint(tmp_path / "one", model, config={})
    edit_description(folder, lambda stored: [stored["model"].pop("critic"), stored.pop("gelu"), stored.pop("reward")])
    again = load_model(folder)
    assert set(again.heads) == {"lm", "critic", "sampler"}
    assert torch.equal(again(IDS), model(IDS))
    for name in ("heads.critic", "model.critic", "gelu", "reward.pooling"):
        assert name in caplog.text
    assert load_into(make(), model.state_dict()) == ["heads.critic"]


def test_generator_loads_into_reward_mode_as_trunk_only(tmp_path, caplog):
    model = make()
    model.untie(8)
    save_checkpoint(tmp_path / "one", model, config={})
    reward = load_model(tmp_path / "one", mode="reward", reward=RewardSection(pooling="last"))
    assert same_tensors(model.trunk.state_dict(), reward.trunk.state_dict())
    assert caplog.text.count("fresh: heads.reward\n") == 1


def test_untied_model_reads_a_tied_checkpoint_and_the_other_way_round():
    tied, untied = make(0), make(1)
    untied.untie(8)
    assert load_into(untied, tied.state_dict()) == ["heads.lm.residual"]
    assert torch.equal(untied(IDS), tied(IDS))
    nn.init.normal_(untied.heads["lm"].matrix)
    other = make(2)
    assert load_into(other, untied.state_dict()) == []
    assert torch.equal(other(IDS), untied(IDS)) and not other.heads["lm"].tied


def test_mismatch_of_shape_names_tensor_expected_and_found():
    with pytest.raises(ValueError, match=r"trunk.wpe.weight: expected shape \[9, 16\], found \[8, 16\]"):
        load_into(make(block_size=9, position="learned"), make(position="learned").state_dict())


@pytest.mark.parametrize(
    ("typo", "message"),
    [
        ("heads.critc.layers.0.weight", "unexpected tensor heads.critc.layers.0.weight"),
        ("trunk.wtf.weight", "unexpected tensor trunk.wtf.weight"),
        ("trnk.norm.weight", "unexpected tensor trnk.norm.weight"),
    ],
)
def test_unexpected_tensors_are_errors(typo, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_into(model, {**make(1).state_dict(), typo: torch.zeros(1)})
    assert same_tensors(model.state_dict(), before)  # refused as a whole


@pytest.mark.parametrize("name", ["trunk.norm.weight", "heads.critic.layers.2.bias"])
def test_missing_tensors_of_a_part_that_is_there_are_errors(name):
    tensors = make(1).state_dict()
    del tensors[name]
    with pytest.raises(ValueError, match=f"missing tensor {name}"):
        load_into(make(), tensors)


def test_unknown_fields_are_errors(tmp_path):
    folder = save_checkpoint(tmp_path / "one", make(), config={})
    edit_description(folder, lambda stored: stored["model"].update(n_leyer=3))
    with pytest.raises(ValueError, match="one: checkpoint.json has unknown fields.*model.n_leyer"):
        load_model(folder)


def test_frozen_trunk_is_assigned_and_never_written_into():
    model, other = make(0), make(1)
    model.freeze_trunk()
    shared = model.trunk.wte.weight.detach()
    before = shared.clone()
    load_into(model, other.state_dict())
    assert torch.equal(shared, before)
    assert same_tensors(model.trunk.state_dict(), other.trunk.state_dict())
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def gpt2(request, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_layer=3, n_head=4, n_embd=32, n_positions=20, initializer_range=0.3,
        tie_word_embeddings=request.param, bos_token_id=0, eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms that a wrong name would show
        if "ln_" in name or "bias" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    return model, tmp_path / "gpt2"


@torch.no_grad()
def test_gpt2_layout_gives_the_logits_of_transformers(gpt2, tmp_path):
    reference, folder = gpt2
    model = load_gpt2(folder)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    torch.testing.assert_close(text_logits(model(ids), model.vocabulary), expected, rtol=1e-5, atol=1e-4)
    save_checkpoint(tmp_path / "ours", model, config={})
    assert torch.equal(load_model(tmp_path / "ours")(ids), model(ids))


@torch.no_grad()
def test_gpt2_s_end_of_text_is_no_text_and_gives_its_place_to_mask(tmp_path):
    """Ids as GPT-2 has them, with bytes for its 50256 tokens: a checkpoint that other pipelines read as any base."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_layer=1, n_head=2, n_embd=16, n_positions=20, bos_token_id=256, eos_token_id=256)).eval()
    with torch.no_grad():  # it wants to end every text at once
        reference.transformer.ln_f.bias.fill_(1.0)
        reference.transformer.wte.weight[256] = 1.0
    reference.save_pretrained(tmp_path / "gpt2")
    tokenizer, model = build_tokenizer("bytes"), load_gpt2(tmp_path / "gpt2", block_size=12)
    assert model.vocabulary == tokenizer.vocabulary and model.vocabulary.mask_id == 256 and model.block_size == 12
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    assert (expected.argmax(-1) == 256).all()
    torch.testing.assert_close(model(ids)[..., :257], expected, rtol=1e-5, atol=1e-4)
    config = Config(model=model.model, data=DataSection(block_size=12), grpo=GrpoSection(prompt_tokens=4))
    folder = save_checkpoint(tmp_path / "base", model, config=to_dict(config), tokenizer=tokenizer)
    generator = TextGenerator(folder)
    assert all("\u2588" not in text and text.startswith("ab") for text in generator("ab", num=20))
    with pytest.raises(ValueError, match="block_size must be at most 20"):
        load_gpt2(tmp_path / "gpt2", block_size=21)


def test_gpt2_settings_that_differ_are_refused(gpt2):
    _, folder = gpt2
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in (("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6)):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"config.json: {key} must be"):
            load_gpt2(folder)
    path.unlink()
    with pytest.raises(ValueError, match="must hold config.json and model.safetensors"):
        load_gpt2(folder)
