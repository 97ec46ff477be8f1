"""Model directories: what is written, what is read, and what each kind of damage is called."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from rlhf_course import checkpoints
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.gpt import GPT
from rlhf_course.huggingface import load_causal_lm


@pytest.fixture
def saved(tmp_path):
    """kind -> the directory of a tiny model of that kind."""

    def save(kind):
        tiny(kind).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------- where a name leads


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert checkpoints.resolve(tmp_path) == tmp_path
    assert checkpoints.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "no/such/folder", "~/no-such"])
def test_a_path_that_leads_nowhere_is_not_looked_for_in_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("hub"))
    with pytest.raises(ModelError, match=f"{name}.*no such directory"):
        checkpoints.resolve(name)


def test_a_file_is_no_model_directory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="no such directory"):
        checkpoints.resolve(file)


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model", "not a name!"])
def test_an_unknown_hub_name_offline(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=f"{name}.*HF_HUB_OFFLINE is set"):
        checkpoints.resolve(name)


def test_a_hub_name_fetches_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoints.resolve("owner/model") == tmp_path
    assert asked["name"] == "owner/model"
    assert not [p for p in asked["patterns"] if p.endswith(("bin", "pt", "pth", "*"))]
    assert {"*.json", "*.safetensors"} <= set(asked["patterns"])


# --------------------------------------------------------------------------- writing, reading


def test_what_is_written_is_read_again(tmp_path):
    transposed = torch.arange(6.0).view(2, 3).t()
    tensors = {"a": transposed, "b": torch.tensor([1, 2]), "c": torch.zeros((), requires_grad=True)}
    checkpoints.write_model(tmp_path / "new" / "folder", {"k": [1, None]}, tensors)
    assert checkpoints.read_config(tmp_path / "new" / "folder") == {"k": [1, None]}
    again = checkpoints.read_tensors(tmp_path / "new" / "folder")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype


def test_shards_are_joined(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoints.read_tensors(tmp_path).keys() == {"a", "b"}


def test_the_tokenizer_and_its_special_ids(tmp_path):
    from rlhf_course.world import make_world

    tokenizer = make_world("town", "tiny").tokenizer
    model = tiny("gpt")
    model.save_pretrained(tmp_path, tokenizer)
    config = checkpoints.read_config(tmp_path)
    assert config["eos_token_id"] == tokenizer.eos_token_id is not None
    assert config["pad_token_id"] == tokenizer.pad_token_id is not None
    assert GPT.from_pretrained(tmp_path).config == model.config


# ---------------------------------------------------------------------------------- damage

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def pickle_only(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def cut_short(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-50])


def empty_file(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def config_without_object(folder):
    (folder / "config.json").write_text("[1]")


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')


def shard_missing(folder):
    (folder / WEIGHTS).rename(folder / "model-00001.safetensors")
    shards = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def broken_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text("{")


def index_without_map(folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text('{"weight_map": 3}')


DAMAGE = {
    no_weights: "model.safetensors",
    pickle_only: "pytorch_model.bin is a pickle",
    cut_short: "safetensors|incomplete",
    empty_file: "header",
    no_config: "no config.json",
    broken_config: "config.json: cannot be read",
    binary_config: "config.json: cannot be read",
    config_without_object: "config.json: not a JSON object",
    unknown_type: "no-such-type",
    shard_missing: "model-00002.safetensors",
    broken_index: "index.json: cannot be read",
    index_without_map: "index.json: names no shards",
}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(saved, kind, damage):
    folder = saved(kind)
    damage(folder)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        load_causal_lm(folder, str(folder))
    assert str(folder) in str(caught.value)


# One matrix of each architecture, in the file and in the error.
MATRIX = {
    "gpt": ("transformer.h.1.mlp.c_fc.weight", "blocks.1.mlp.expand.weight"),
    "llama": ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "qwen2": ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
}


@pytest.mark.parametrize("kind", MATRIX)
def test_a_missing_tensor_is_named(saved, kind):
    folder, (stored, told) = saved(kind), MATRIX[kind]
    change_tensors(folder, lambda tensors: tensors.pop(stored))
    with pytest.raises(CheckpointError, match=f"missing.*{told}"):
        load_causal_lm(folder, str(folder))


@pytest.mark.parametrize("kind", MATRIX)
def test_a_tensor_of_another_shape_is_named(saved, kind):
    folder, (stored, told) = saved(kind), MATRIX[kind]
    change_tensors(folder, lambda tensors: tensors.update({stored: torch.zeros(2, 3)}))
    with pytest.raises(CheckpointError, match=told):
        load_causal_lm(folder, str(folder))


@pytest.mark.parametrize("kind", MATRIX)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(saved, kind, value):
    folder, (stored, told) = saved(kind), MATRIX[kind]
    change_tensors(folder, lambda tensors: tensors[stored].view(-1)[3].fill_(value))
    with pytest.raises(CheckpointError, match=f"{told} holds NaN or infinite"):
        load_causal_lm(folder, str(folder))


def test_missing_surplus_and_misshapen_tensors_are_counted_and_nothing_is_loaded():
    linear = torch.nn.Linear(2, 3)
    before = linear.weight.clone()
    surplus = {name: torch.ones(1) for name in "abcdef"}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_into(linear, {"weight": torch.ones(3, 3), **surplus}, "somewhere")
    message = str(caught.value)
    assert message.startswith("somewhere: ")
    assert "missing: bias (1 in all)" in message
    assert "unknown: a, b, c, d … (6 in all)" in message
    assert "weight is (3, 3), expected (3, 2)" in message
    assert torch.equal(linear.weight, before)


def test_a_reward_model_is_no_language_model(saved):
    folder = saved("gpt")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["GPT2ForSequenceClassification"]}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds a GPT2ForSequenceClassification"):
        load_causal_lm(folder, str(folder))
