"""Networks of diffusers as denoisers: what they are told, where they come from, and that an artefact needs no folder. All random and tiny."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from limbeck import models
from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.diffusion import adapters, latents
from limbeck.diffusion.adapters import diffusers_dit, diffusers_unet, diffusers_unet_condition, read_embeddings, trained_with
from limbeck.diffusion.denoisers import Guided
from limbeck.diffusion.generator import Generator
from limbeck.diffusion.noised_discriminator import feature_shapes
from limbeck.errors import InputError, MissingExtra
from limbeck.export import load, save
from limbeck.models import build_model
from limbeck.recipe import Recipe
from limbeck.run import distill

diffusers = pytest.importorskip("diffusers")

NAMES = {name: f"limbeck.diffusion.adapters:{name}" for name in ("diffusers_unet", "diffusers_unet_condition", "diffusers_dit")}
UNET: dict[str, Any] = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "patch_size": 2}
TEXT: dict[str, Any] = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 6,
}  # fmt: skip
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in NAMES.items():
        monkeypatch.setitem(models.CATALOGUE, name, path)


def made(name: str, **args: Any) -> Any:
    return build_model(Component(name=name, args=args), num_classes=4, input_shape=SHAPE, seed=0).eval()


def noised(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, the steps n, and t = n/1000."""
    n = torch.tensor([57, 999, 0][:count])
    return torch.randn(count, *SHAPE), n, n.double() / 1000


# ---- what the networks are told --------------------------------------------------------------------------------------------


def test_a_u_net_is_told_the_step_and_the_class() -> None:
    denoiser = made("diffusers_unet", model=UNET)
    assert (denoiser.num_classes, denoiser.shape, denoiser.prediction, denoiser.schedule.name) == (4, SHAPE, "eps", "vp")
    x, n, t = noised()
    labels = torch.tensor([0, 3, 4])
    with torch.no_grad():
        expected = denoiser.network.model(x, n, class_labels=labels).sample  # whole steps, as diffusers' own pipelines
        assert torch.equal(denoiser(x, t, labels, out="eps"), expected)
        assert torch.equal(denoiser(x, t, None), denoiser(x, t, denoiser.null(3, x.device)))
        assert not torch.equal(denoiser(x, t, labels), denoiser(x, t, None))
        one = denoiser.network(x, torch.tensor(57.0), labels)
    torch.testing.assert_close(one[0], expected[0], rtol=1e-4, atol=1e-5)


def test_a_u_net_without_classes_takes_none() -> None:
    denoiser = made("diffusers_unet", model=UNET, conditional=False)
    assert denoiser.num_classes == 0
    x, _, t = noised()
    assert denoiser(x, t).shape == x.shape
    with pytest.raises(InputError, match="no classes"):
        denoiser(x, t, torch.zeros(3, dtype=torch.long))


def test_a_dit_is_told_the_same_in_training_and_drops_no_label_by_itself() -> None:
    denoiser = made("diffusers_dit", model=DIT)
    for weight in denoiser.parameters():  # a fresh DiT is zero at many places
        torch.nn.init.normal_(weight, std=0.2)
    x, n, t = noised()
    labels = torch.tensor([0, 3, 4])
    with torch.no_grad():
        expected = denoiser.network.model(x, n, class_labels=labels).sample
        assert torch.equal(denoiser(x, t, labels, out="eps"), expected)
        denoiser.train()
        assert all(torch.equal(denoiser(x, t, labels, out="eps"), expected) for _ in range(8))
        assert not torch.equal(denoiser(x, t, None, out="eps"), expected)
    free = made("diffusers_dit", model=DIT, conditional=False)
    assert free.num_classes == 0
    assert free(x, t).shape == x.shape


def test_learned_variances_are_left_out() -> None:
    denoiser = made("diffusers_dit", model={**DIT, "out_channels": 6})
    torch.nn.init.normal_(denoiser.network.model.proj_out_2.weight)
    x, n, t = noised()
    with torch.no_grad():
        whole = denoiser.network.model(x, n, class_labels=torch.full((3,), 4)).sample
        assert whole.shape[1] == 6
        assert torch.equal(denoiser(x, t, out="eps"), whole[:, :3])


def test_text_by_number_as_embeddings_or_none() -> None:
    denoiser = made("diffusers_unet_condition", model=TEXT, tokens=5)
    table = denoiser.network.prompts
    assert table.shape == (5, 5, 6)
    assert denoiser.num_classes == 4
    x, n, t = noised()
    numbers = torch.tensor([2, 0, 4])
    with torch.no_grad():
        expected = denoiser.network.model(x, n, encoder_hidden_states=table[numbers]).sample
        assert torch.equal(denoiser(x, t, numbers, out="eps"), expected)
        assert torch.equal(denoiser(x, t, table[numbers], out="eps"), expected)
        assert torch.equal(denoiser(x, t, None), denoiser(x, t, denoiser.null(3, x.device)))
        guided = Guided(denoiser, 3.0)
        by_hand = denoiser(x, t, None) + 3 * (denoiser(x, t, numbers) - denoiser(x, t, None))
        torch.testing.assert_close(guided(x, t, numbers), by_hand, rtol=1e-3, atol=1e-3)
        # without a table the null condition is the empty prompt's embeddings, and guidance takes embeddings
        free = build_model(Component(name="diffusers_unet_condition", args={"model": TEXT, "tokens": 5}), num_classes=0, input_shape=SHAPE, seed=0).eval()
        assert free.num_classes == 0
        null = free.null(3, x.device)
        assert null is not None
        assert null.shape == (3, 5, 6)
        free.load_state_dict({**denoiser.state_dict(), "network.prompts": table[-1:]})
        torch.testing.assert_close(Guided(free, 3.0)(x, t, table[numbers]), by_hand, rtol=1e-3, atol=1e-3)


# ---- features --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "sizes"),
    [
        ("diffusers_unet", {"model": UNET}, {"down1": (8, 4, 4), "down2": (16, 4, 4), "bottleneck": (16, 4, 4), "up1": (16, 8, 8), "up2": (8, 8, 8)}),
        ("diffusers_dit", {"model": DIT}, {"block1": (16, 4, 4), "block2": (16, 4, 4), "bottleneck": (16, 4, 4), "block3": (16, 4, 4)}),
        ("diffusers_unet_condition", {"model": TEXT, "tokens": 3}, {"down2": (16, 4, 4), "bottleneck": (16, 4, 4), "up2": (8, 8, 8)}),
    ],
)
def test_features_are_read_where_they_are_said_to_be(name: str, args: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> None:
    denoiser = made(name, **args)
    assert feature_shapes(denoiser, list(sizes)) == sizes
    assert {tap: denoiser.taps[tap] for tap in sizes} == {tap: size[0] for tap, size in sizes.items()}
    x, _, t = noised()
    labels = torch.tensor([0, 1, 4])
    whole, found = denoiser.forward_with(x.requires_grad_(), t, labels, ["bottleneck"])
    torch.testing.assert_close(whole, denoiser(x, t, labels))
    ran = []
    model = denoiser.network.model
    last = model.conv_out if hasattr(model, "conv_out") else model.transformer_blocks[2]
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    alone = denoiser.features(x, t, labels, ["bottleneck"])
    assert not ran  # nothing behind the tap
    handle.remove()
    torch.testing.assert_close(alone["bottleneck"], found["bottleneck"])
    gradient = torch.autograd.grad(alone["bottleneck"].square().mean(), x)[0]
    assert gradient.abs().sum() > 0
    assert denoiser.features(x, t, labels, []) == {}
    assert not any(part._forward_hooks for part in denoiser.modules())
    with pytest.raises(InputError, match=r"no tap 'bottelneck'.*bottleneck"):
        denoiser.features(x, t, labels, ["bottelneck"])


# ---- folders ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines as diffusers saves them."""
    place = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    fields = {**UNET, "sample_size": 8}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **betas)
    diffusers.DDIMPipeline(diffusers.UNet2DModel(num_class_embeds=5, **fields), ddim).save_pretrained(place / "v")
    diffusers.DDPMPipeline(diffusers.UNet2DModel(num_class_embeds=4, **fields), diffusers.DDPMScheduler()).save_pretrained(place / "no null")
    diffusers.UNet2DModel(**fields).save_pretrained(place / "plain")
    diffusers.DiTTransformer2DModel(in_channels=3, sample_size=8, num_embeds_ada_norm=4, **DIT).save_pretrained(place / "dit")
    diffusers.UNet2DConditionModel(in_channels=3, out_channels=3, sample_size=8, **TEXT).save_pretrained(place / "text")
    torch.manual_seed(1)
    safetensors.torch.save_file({"prompts": torch.randn(4, 5, 6), "null": torch.randn(5, 6)}, place / "prompts.safetensors")
    return place


def test_a_pipelines_folder_says_schedule_and_prediction(folders: Path) -> None:
    denoiser = made("diffusers_unet", model=str(folders / "v"))
    assert (denoiser.prediction, denoiser.schedule.name, denoiser.num_classes) == ("v", "vp", 4)
    pipeline = diffusers.DDIMPipeline.from_pretrained(folders / "v")
    x, n, t = noised()
    torch.testing.assert_close(denoiser.schedule.alpha(t).float(), pipeline.scheduler.alphas_cumprod[n].sqrt(), rtol=1e-4, atol=1e-6)
    labels = torch.tensor([0, 1, 4])
    pipeline.scheduler.set_timesteps(1000)
    with torch.no_grad():
        raw = pipeline.unet(x, n, class_labels=labels).sample
        found = denoiser(x, t, labels)
    for i in range(3):
        theirs = pipeline.scheduler.step(raw[i : i + 1], int(n[i]), x[i : i + 1]).pred_original_sample
        torch.testing.assert_close(found[i : i + 1], theirs, rtol=1e-3, atol=1e-4)


def test_what_is_said_goes_before_what_the_folder_says(folders: Path) -> None:
    denoiser = made("diffusers_unet", model=str(folders / "v"), schedule="flow", prediction="velocity")
    assert (denoiser.schedule.name, denoiser.prediction) == ("flow", "velocity")
    assert made("diffusers_unet", model=str(folders / "v"), precondition="edm").prediction == "x0"
    assert made("diffusers_unet", model=UNET, schedule="flow").prediction == "velocity"
    linear = made("diffusers_unet", model=str(folders / "no null")).schedule
    assert (linear.kind, linear.beta_start, linear.beta_end) == ("linear", 0.0001, 0.02)


def test_a_model_without_a_null_class_gets_one_of_zeros(folders: Path) -> None:
    denoiser = made("diffusers_unet", model=str(folders / "no null"))
    original = diffusers.UNet2DModel.from_pretrained(folders / "no null" / "unet")
    assert torch.equal(denoiser.network.model.class_embedding.weight[:4], original.class_embedding.weight)
    assert not denoiser.network.model.class_embedding.weight[4].any()
    assert denoiser.network.model.config.num_class_embeds == 5
    plain = made("diffusers_unet", model=str(folders / "plain"))  # its model takes no classes, whatever the data have
    assert plain.num_classes == 0


def cases(folders: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [
        ("diffusers_unet", {"model": str(folders / "v")}, {}),
        ("diffusers_unet", {"model": str(folders / "no null")}, {}),
        ("diffusers_unet", {"model": str(folders / "plain"), "precondition": "edm", "schedule": "edm"}, {}),
        ("diffusers_dit", {"model": str(folders / "dit"), "schedule": {"name": "flow", "t_max": 0.99}}, {}),
        ("diffusers_unet_condition", {"model": str(folders / "text"), "embeddings": str(folders / "prompts.safetensors")}, {}),
    ]


@pytest.mark.parametrize("case", range(5))
def test_a_saved_generator_needs_no_folder(folders: Path, tmp_path: Path, case: int) -> None:
    shutil.copytree(folders, tmp_path / "source")
    name, args, _ = cases(tmp_path / "source")[case]
    component = Component(name=name, args=args)
    denoiser: Any = build_model(component, num_classes=4, input_shape=SHAPE, seed=0)
    generator = Generator(denoiser, denoiser.schedule.few_steps(2))
    around = Component(name="generator", args={"denoiser": component.model_dump(mode="json"), **generator.arguments})
    save(Artefact("generator", generator), tmp_path / "run", model=around, num_classes=4, input_shape=SHAPE, preprocess={}, classes=(), extra={})
    save(Artefact("denoiser", denoiser), tmp_path / "alone", model=component, num_classes=4, input_shape=SHAPE, preprocess={}, classes=(), extra={})
    expected = generator.sample(3)
    shutil.rmtree(tmp_path / "source")
    again: Any = load(tmp_path / "run")
    assert torch.equal(again.sample(3), expected)
    assert str(tmp_path) not in json.dumps(again.limbeck_config)
    x, _, t = noised(2)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "alone")(x, t), denoiser.eval()(x, t))
    assert again.denoiser.schedule.t_max == denoiser.schedule.t_max
    if case == 4:
        assert torch.equal(again.denoiser.network.prompts, denoiser.network.prompts)


# ---- what is wrong is told -------------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda f: diffusers_unet(SHAPE, 4, {**UNET, "layers_per_blok": 1}), "model.layers_per_blok", "layers_per_block"),
    (lambda f: diffusers_unet(SHAPE, 4, {**UNET, "norm_num_groups": 5}), "model", "refuses"),
    (lambda f: diffusers_unet(SHAPE, 4, "runwayml/stable-diffusion-v1-5"), "model", "nothing is fetched"),
    (lambda f: diffusers_unet(SHAPE, 4, str(f)), str, "config.json"),
    (lambda f: diffusers_unet(SHAPE, 4, str(f / "text")), str, "UNet2DConditionModel, not a UNet2DModel"),
    (lambda f: diffusers_unet(SHAPE, 9, str(f / "v")), "model", "5 class embeddings, the data 9"),
    (lambda f: diffusers_unet((1, 8, 8), 4, str(f / "v")), "model", "takes 3 channels, the data have 1"),
    (lambda f: diffusers_unet(SHAPE, 4, {**UNET, "out_channels": 5}), "model", "5 channels"),
    (lambda f: diffusers_unet(SHAPE, 4, {**UNET, "time_embedding_type": "fourier"}), "model", "fourier"),
    (lambda f: diffusers_unet(SHAPE, 4, {**UNET, "class_embed_type": "timestep"}), "model", "timestep"),
    (lambda f: diffusers_unet((2,), 4, UNET), "input_shape", "images"),
    (lambda f: diffusers_dit(SHAPE, 3, str(f / "dit")), "model", "4 classes, the data have 3"),
    (lambda f: diffusers_dit((3, 16, 16), 4, str(f / "dit")), "model", "built for 8×8"),
    (lambda f: diffusers_dit((3, 8, 6), 4, DIT), "input_shape", "square"),
    (lambda f: diffusers_unet_condition(SHAPE, 3, TEXT, str(f / "prompts.safetensors")), "embeddings", "4 prompts, the data have 3"),
    (lambda f: diffusers_unet_condition(SHAPE, 4, {**TEXT, "cross_attention_dim": 7}, str(f / "prompts.safetensors")), "embeddings", "width"),
    (lambda f: diffusers_unet_condition(SHAPE, 4, {**TEXT, "num_class_embeds": 3}), "model", "num_class_embeds"),
    (lambda f: read_embeddings(f / "plain" / "diffusion_pytorch_model.safetensors"), str, "'prompts'"),
    (lambda f: read_embeddings(f / "none"), str, "no such file"),
    (lambda f: trained_with(f), str, "no such file"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_told(folders: Path, case: int) -> None:
    call, where, words = WRONG[case]
    with pytest.raises(InputError) as caught:
        call(folders)
    assert words in str(caught.value)
    assert where is str or caught.value.where == where


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"_class_name": "KarrasVeScheduler"}, "not known"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescaled"),
        ({"num_train_timesteps": 500}, "500 steps"),
        ({"prediction_type": "flow"}, "flow"),
    ],
)
def test_a_scheduler_that_makes_no_schedule_is_told(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"} | fields))
    with pytest.raises(InputError, match=words) as caught:
        trained_with(tmp_path)
    assert caught.value.where.endswith("scheduler_config.json")


def test_flow_matching_is_velocity(tmp_path: Path) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    found = trained_with(tmp_path)
    assert (found.schedule, found.prediction) == ({"name": "flow"}, "velocity")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"limbeck\[diffusion\]"):
        adapters.diffusers_unet(SHAPE, 4, UNET)


def test_dmd2_distils_a_network_of_diffusers_with_heads_on_its_features(tmp_path: Path) -> None:
    recipe = {
        "name": "adapted",
        "threads": 1,
        "method": {"name": "dmd2", "ratio": 2, "gan": {"weight": 1e-2}},
        "teacher": {"model": {"name": "diffusers_unet", "model": UNET}, "method": "denoising", "train": {"steps": 4, "batch_size": 16}},
        "data": {"source": {"name": "digits", "scale": "symmetric"}, "test_size": 50},
        "train": {"steps": 6, "batch_size": 16, "ema": 0.9},
        "evaluate": {"samples": 20, "teacher_steps": [2], "latency": False, "features": {"kind": "pixels"}},
    }
    result = distill(Recipe.parse(recipe), run=tmp_path / "run")
    again: Any = load(tmp_path / "run")
    assert torch.equal(again.sample(3, labels=4), result.student.sample(3, labels=4))  # type: ignore[union-attr]
    assert again.limbeck_config["model"]["args"]["denoiser"]["args"]["model"]["num_class_embeds"] == 11


# ---- a whole pipeline as a teacher -----------------------------------------------------------------------------------------

LATENT = (4, 4, 4)
PROMPTS = ["a cat", "a dog on a mat"]


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline of random weights with a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("stable")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=12)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4,
        latent_channels=4, sample_size=8,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, sample_size=4, **{**TEXT, "cross_attention_dim": 8})
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(config), tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(place / "pipeline")
    return place / "pipeline"


def test_a_pipeline_says_the_same_as_in_diffusers(stable: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    opened = latents.open_pipeline(stable)
    table = opened.table(PROMPTS)
    theirs, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(table, torch.cat([theirs, null[:1]]))
    denoiser = latents.diffusers_pipeline(LATENT, 2, str(stable), PROMPTS)
    assert (denoiser.num_classes, denoiser.prediction, denoiser.schedule.name, denoiser.shape) == (2, "eps", "vp", LATENT)
    x, n = torch.randn(2, *LATENT), 500
    t = torch.full((2,), n / 1000, dtype=torch.float64)
    with torch.no_grad():
        both = pipeline.unet(torch.cat([x, x]), n, torch.cat([null, theirs])).sample
        free, given = both.chunk(2)
        found = Guided(denoiser, 7.5)(x, t, torch.tensor([0, 1]), out="eps")
    torch.testing.assert_close(found, free + 7.5 * (given - free), rtol=1e-4, atol=1e-4)
    # latents and images, as the pipeline scales them
    images = torch.rand(3, 3, 8, 8)
    coded = opened.encode(images)
    assert coded.shape == (3, *LATENT)
    with torch.no_grad():
        by_hand = pipeline.vae.encode(2 * images - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        shown = pipeline(prompt=PROMPTS, latents=x, num_inference_steps=1, output_type="latent").images
        decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(shown / pipeline.vae.config.scaling_factor).sample, output_type="pt")
    torch.testing.assert_close(coded, by_hand)
    torch.testing.assert_close(opened.decode(shown, batch_size=1), decoded)


def test_latents_with_prompts_are_data_and_the_denoiser_fits_them(stable: Path, tmp_path: Path) -> None:
    opened = latents.open_pipeline(stable)
    images, numbers = torch.rand(12, 3, 8, 8), torch.arange(12) % 2
    file = latents.write_latents(opened, images, numbers, PROMPTS, tmp_path / "data.safetensors")
    splits = latents.latents(str(file), test_size=4)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert list(splits.train.classes) == PROMPTS
    inputs, targets = splits.train.fetch(torch.arange(8))
    assert targets is not None
    assert targets.bincount().tolist() == [4, 4]
    coded = opened.encode(images)
    assert all(any(torch.equal(one, other) for other in coded) for one in splits.train.prepare(inputs))
    torch.testing.assert_close(read_embeddings(file), opened.table(PROMPTS))
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\n\na dog on a mat\n")
    by_pipeline = latents.diffusers_pipeline(LATENT, 2, str(stable), str(text)).eval()
    by_file = diffusers_unet_condition(LATENT, 2, str(stable), embeddings=str(file)).eval()
    x, t = inputs[:2], torch.full((2,), 0.3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(by_pipeline(x, t, targets[:2]), by_file(x, t, targets[:2]))


def test_what_is_saved_of_a_pipeline_needs_neither_folder_nor_text_encoder(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CATALOGUE, "diffusers_pipeline", "limbeck.diffusion.latents:diffusers_pipeline")
    shutil.copytree(stable, tmp_path / "source")
    component = Component(name="diffusers_pipeline", args={"path": str(tmp_path / "source"), "prompts": PROMPTS})
    denoiser: Any = build_model(component, num_classes=2, input_shape=LATENT, seed=0)
    generator = Generator(denoiser, [0.999])
    around = Component(name="generator", args={"denoiser": component.model_dump(mode="json"), **generator.arguments})
    save(Artefact("generator", generator), tmp_path / "run", model=around, num_classes=2, input_shape=LATENT, preprocess={}, classes=PROMPTS, extra={})
    expected = generator.sample(3)
    shutil.rmtree(tmp_path / "source")
    again: Any = load(tmp_path / "run")
    assert again.limbeck_config["model"]["args"]["denoiser"]["name"] == "diffusers_unet_condition"
    assert torch.equal(again.sample(3), expected)


def test_what_is_no_pipeline_is_told(stable: Path, folders: Path, tmp_path: Path) -> None:
    file = latents.write_embeddings(latents.open_pipeline(stable), PROMPTS, tmp_path / "prompts.safetensors")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: latents.open_pipeline(tmp_path), "model_index.json"),
        (lambda: latents.open_pipeline(folders / "v"), "vae is None"),
        (lambda: latents.diffusers_pipeline(LATENT, 3, str(stable), PROMPTS), "2 prompts, the data have 3"),
        (lambda: latents.diffusers_pipeline(LATENT, 3, str(stable), "no file"), "no file"),
        (lambda: latents.diffusers_pipeline((3, 4, 4), 2, str(stable), PROMPTS), "takes 4 channels"),
        (lambda: latents.latents(str(file)), "'latents' and 'targets'"),
        (lambda: latents.latents("none"), "no such file"),
        (lambda: latents.write_latents(latents.open_pipeline(stable), torch.rand(2, 3, 8, 8), torch.tensor([0, 2]), PROMPTS, file), "2 prompts"),
    ]
    for call, words in cases:
        with pytest.raises(InputError) as caught:
            call()
        assert words in str(caught.value)
    shutil.copytree(stable, tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "vae")
    with pytest.raises(InputError, match="cannot be opened"):
        latents.open_pipeline(tmp_path / "torn")


def test_the_recipe_for_stable_diffusion_is_one() -> None:
    recipe = Recipe.read(Path(__file__).resolve().parents[2] / "recipes" / "sd_dmd2.yaml")
    assert recipe.teacher[0].model.name == "diffusers_pipeline"
    assert recipe.student is not None
    assert recipe.student.model == recipe.teacher[0].model
