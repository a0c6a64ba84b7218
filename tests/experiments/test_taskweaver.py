"""TaskWeaver: weights from the prompt, on small models of transformers that are built from a config."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from ctxkern.experiments.taskweaver import TaskWeaver, TaskWeaverConfig  # noqa: E402

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24}


def neox(**changes):
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES | {"eos_token_id": 0, "bos_token_id": 0} | changes)
    ).eval()


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=3, n_inner=24, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


KINDS = {"neox": (neox, "query_key_value"), "llama": (llama, "q_proj, v_proj,down_proj"), "gpt2": (gpt2, "c_attn")}


def woven(lm=None, targets="query_key_value", trained=True, hidden=8):
    """A TaskWeaver in float64, which writes weights that are not zero if `trained`."""
    config = TaskWeaverConfig(hidden_dim=hidden, lora_target_layers=targets, lora_alpha=4.0)
    torch.manual_seed(1)
    weaver = TaskWeaver(lm or neox(), config).double()
    if trained:
        with torch.no_grad():
            for head in weaver.to_B:
                head.weight.normal_(std=0.5)
    return weaver.eval()


def prompts(lengths=(5, 3, 7), side="right", seed=0):
    """(ids, mask) of rows of random tokens, padded with 0."""
    rng, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(1, 40, (length,), generator=rng)
        mask[row, place] = 1
    return ids, mask


def merged(weaver, build, ids):
    """A plain model with the weights of one prompt [1, S]."""
    plain = build().double()
    weights = weaver.weights(weaver.embed(ids))
    scale = weaver.config.lora_alpha / weaver.config.lora_rank
    with torch.no_grad():
        for name, (A, B) in weights.items():
            layer = plain.get_submodule(name)
            change = scale * B[0] @ A[0]
            layer.weight += change if isinstance(layer, torch.nn.Linear) else change.T
    return plain


@pytest.mark.parametrize(("hidden", "trainable"), [(256, 1_318_912), (1024, 6_836_224)])
def test_counts_at_the_shapes_of_pythia_70m(hidden, trainable):
    with torch.device("meta"):
        lm = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=50304, hidden_size=512, num_attention_heads=8, num_hidden_layers=6, intermediate_size=2048
            )
        )
        weaver = TaskWeaver(lm, TaskWeaverConfig(hidden_dim=hidden))
    assert weaver.parameter_counts() == {"trainable": trainable, "total": 70_426_624 + trainable}


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_language_model(kind):
    build, targets = KINDS[kind]
    plain, weaver = build(), TaskWeaver(build(), TaskWeaverConfig(hidden_dim=8, lora_target_layers=targets))
    ids, mask = prompts()
    assert torch.equal(weaver(ids, mask).logits, plain(ids, attention_mask=mask).logits)


def test_gradients_are_those_of_the_hypernetwork():
    weaver = woven().train()
    assert not weaver.lm.training
    ids, mask = prompts()
    weaver(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    for name, parameter in weaver.named_parameters():
        if name.startswith("lm."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_the_weights_of_its_prompt(kind):
    build, targets = KINDS[kind]
    weaver = woven(build(), targets)
    ids, mask = prompts((6, 6, 6))
    logits = weaver(ids, mask).logits
    for row in range(3):
        one = ids[row : row + 1]
        assert_close(logits[row : row + 1], merged(weaver, build, one)(one).logits)
    assert not torch.allclose(logits[:1], build().double()(ids[:1]).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_an_embedding(kind, side):
    build, targets = KINDS[kind]
    weaver = woven(build(), targets)
    ids, mask = prompts(side=side)
    rows = [weaver.embed(ids[row : row + 1, mask[row].bool()]) for row in range(3)]
    assert_close(weaver.embed(ids, mask), torch.cat(rows))


def test_the_prompt_is_a_part_of_its_row():
    """What follows it is not seen, and its length counts tokens from the first that is not padding."""
    weaver = woven()
    for side in ("left", "right"):
        ids, mask = prompts(side=side)
        lengths = torch.tensor([2, 3, 4])
        rows = [weaver.embed(ids[row : row + 1, mask[row].bool()][:, : lengths[row]]) for row in range(3)]
        assert_close(weaver.embed(ids, mask, lengths), torch.cat(rows))
    with pytest.raises(ValueError, match=r"prompt_lengths is \[0, 3, 7\]; each must be at least 1 and at most"):
        weaver.embed(*prompts(), torch.tensor([0, 3, 7]))
    with pytest.raises(ValueError, match=r"at most the tokens of its row, \[5, 3, 7\]"):
        weaver.embed(*prompts(), torch.tensor([5, 4, 7]))


HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_batch_is_continued_as_its_prompts_are_alone(how):
    weaver = woven()
    ids, mask = prompts(side="left")
    given = {"max_new_tokens": 6, "min_new_tokens": 6, **how}
    together = weaver.generate(ids, mask, **given)
    several = given.get("num_return_sequences", 1)
    assert together.shape == (3 * several, 13)
    for row in range(3):
        one = ids[row : row + 1, mask[row].bool()]
        alone = merged(weaver, neox, one).generate(one, attention_mask=torch.ones_like(one), pad_token_id=0, **given)
        assert torch.equal(together[several * row : several * (row + 1), 7:], alone[:, one.shape[1] :])


def test_a_temperature_samples():
    weaver = woven()
    ids, mask = prompts((4,))
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(tuple(weaver.generate(ids, mask, max_new_tokens=8, temperature=0.7)[0].tolist()))
    assert len(found) > 1
    cold = [weaver.generate(ids, mask, max_new_tokens=8, temperature=0.0) for _ in range(2)]
    assert torch.equal(*cold)


def test_files_hold_the_hypernetwork_alone(tmp_path):
    weaver = woven()
    weaver.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    read = TaskWeaver.from_pretrained(tmp_path / "saved", lm=neox()).double()
    ids, mask = prompts()
    # the file keeps the dtype of what was saved; a model is read in float32
    assert_close(read.embed(ids, mask), weaver.embed(ids, mask))
    kept = dict(read.named_parameters())
    for name, t in weaver.named_parameters():
        assert torch.equal(kept[name], t.float().double()), name
    # as torch wrote it before
    (tmp_path / "saved" / "model.safetensors").unlink()
    own = {name: t for name, t in weaver.state_dict().items() if not name.startswith("lm.")}
    torch.save(own, tmp_path / "saved" / "pytorch_model.bin")
    legacy = TaskWeaver.from_pretrained(tmp_path / "saved", lm=neox()).double()
    assert all(torch.equal(t, read.state_dict()[name]) for name, t in legacy.state_dict().items())


def test_a_language_model_is_found_by_its_name(tmp_path):
    neox().save_pretrained(tmp_path / "lm")
    woven().save_pretrained(tmp_path / "saved")
    from helpers.language import save_model

    # its tokenizer is that of the tests' language model
    for path in save_model(tmp_path / "tokens").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "lm")
    read = TaskWeaver.from_pretrained(tmp_path / "saved", model_name=str(tmp_path / "lm"))
    assert read.config.model_name == str(tmp_path / "lm")
    assert torch.equal(read.lm.gpt_neox.embed_in.weight, neox().gpt_neox.embed_in.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_adapter_of_a_prompt(kind, tmp_path):
    peft = pytest.importorskip("peft")
    build, targets = KINDS[kind]
    weaver = woven(build(), targets)
    ids, _ = prompts((6,))
    weaver.export(ids, tmp_path)
    adapted = peft.PeftModel.from_pretrained(build().double(), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(adapted.double()(ids).logits, weaver(ids).logits)
    with pytest.raises(ValueError, match="input_ids has 3 rows; it must have one, the prompt"):
        weaver.export(prompts()[0], tmp_path)


class _Evil:
    def __reduce__(self):
        return (print, ("code of a file was run",))


def test_bad_files_are_named(tmp_path, capsys):
    folder = tmp_path / "saved"
    with pytest.raises(ValueError, match=r"has no config\.json; it must be a folder of save_pretrained"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    woven().save_pretrained(folder)
    other = r"has width 24, 3 target layers with weights \[72, 24\]; .* which has width 16, 3 target layers"
    with pytest.raises(ValueError, match=other):
        TaskWeaver.from_pretrained(folder, lm=neox(hidden_size=24))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dim": 9}))
    with pytest.raises(ValueError, match=r"'factors.weight' has the shape \[2, 8\]; it must be \[2, 9\]"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    torch.save({"mlp.0.weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    assert "code of a file" not in capsys.readouterr().out
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds something else than tensors by name; it must hold a state_dict"):
        TaskWeaver.from_pretrained(folder, lm=neox())
    for stored, words in (
        ([], "model_type is 'list'; it must be 'taskweaver'"),
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'; it must be 'taskweaver'"),
        ({"experiment": "taskweaver train", "train": {}}, "it is of a run without a hypernetwork"),
        (config | {"shapes": 1}, "shapes is not as save_pretrained writes it"),
    ):
        (folder / "config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=words):
            TaskWeaver.from_pretrained(folder, lm=neox())


def test_a_language_model_that_does_not_fit_is_named_and_left_alone(tmp_path):
    lm = neox()
    lm.config._name_or_path = "owner/trained"
    woven(lm).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_name"] == "owner/trained"
    wide = neox(hidden_size=24)
    wide.config._name_or_path = "owner/wide"
    for _ in range(2):
        with pytest.raises(ValueError, match="'owner/wide' has width 24, .* was trained on 'owner/trained', which has"):
            TaskWeaver.from_pretrained(tmp_path, lm=wide)
    with pytest.raises(ValueError, match="'LlamaForCausalLM' does not fit, .* on 'owner/trained': .*means no layer"):
        TaskWeaver.from_pretrained(tmp_path, lm=llama())


def test_texts_fit_the_positions_of_the_language_model():
    weaver = woven(gpt2(), "c_attn")
    ids, _ = prompts((40,))
    with pytest.raises(ValueError, match="65 tokens; they must be at most 64, the positions of the language model"):
        weaver.generate(ids, max_new_tokens=25)
    assert weaver.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None).shape == (1, 64)
    # positions that are computed have no end
    assert woven().generate(prompts((5,))[0], max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 8)


def test_several_tokens_may_end_a_text():
    weaver = woven()
    weaver.lm.generation_config.eos_token_id = [0, 3]
    weaver.lm.generation_config.pad_token_id = None
    assert weaver.generate(prompts((5, 5))[0], max_new_tokens=3, do_sample=False).shape[0] == 2


def test_targets_must_be_there():
    with pytest.raises(ValueError, match=r"targets has 'q_proj', which means no layer"):
        woven(targets="q_proj")
    with pytest.raises(ValueError, match=r"lora_target_layers has 'lm_head', which is in no numbered block"):
        woven(targets="lm_head")
