# mypy: ignore-errors
# (diffusers' mix-ins tell type checkers nothing)
"""Samples from a generator that limbeck distilled, with diffusers and torch alone.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    samples = pipe(16, labels=3, seed=0).images

Every call of the network is one row of `table`, numbers that limbeck computed from the noise schedule, the preconditioning and the list of times:
x̂0 = skip·x + out·network(input·x, time), and then x ← keep·x + signal·x̂0 + noise·fresh noise.
"""

import hashlib

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, ModelMixin, UNet2DConditionModel, UNet2DModel


def between(seed: int, device: torch.device) -> torch.Generator:
    """What draws fresh noise between the calls, as limbeck's `sample(seed=…)` seeds it."""
    text = f"int:{seed}\x1fstr:between"
    derived = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator(device).manual_seed(derived)


def predict(network: torch.nn.Module, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor | None, embeddings: torch.Tensor | None) -> torch.Tensor:
    """What the network puts out, [B, *shape], without learned variances."""
    if isinstance(network, UNet2DModel):
        raw = network(x, time, class_labels=labels, return_dict=False)[0]
    elif isinstance(network, DiTTransformer2DModel):  # without classes: its class 1, the null one
        raw = network(x, timestep=time, class_labels=torch.ones_like(time).long() if labels is None else labels, return_dict=False)[0]
    elif isinstance(network, UNet2DConditionModel):
        raw = network(x, time, encoder_hidden_states=embeddings, return_dict=False)[0]
    else:
        raw = network(x, time, labels)
    return raw[:, : x.shape[1]]


class LimbeckPipeline(DiffusionPipeline):
    """Noise → samples in as many network calls as `table` has rows.

    Args:
        network: called with (x, time, labels). table: see the module; times are what the network is told. start: what standard normal noise is multiplied by.
        shape: of one sample. num_classes: labels 0..num_classes−1, 0: none. mean, std, bounded: from the network's units to the data's (a channel each;
            kept within [0, 1]). classes: their names. facts: what it was made of, for the reader: schedule, times, mode, prediction, preconditioning.
    """

    def __init__(
        self,
        network: ModelMixin,
        table: list[dict[str, float]] = (),
        start: float = 1.0,
        shape: list[int] = (),
        num_classes: int = 0,
        mean: list[float] = (0.0,),
        std: list[float] = (1.0,),
        bounded: bool = False,
        classes: list[str] = (),
        facts: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.register_to_config(
            table=list(table), start=start, shape=list(shape), num_classes=num_classes, mean=list(mean), std=list(std), bounded=bounded,
            classes=list(classes), facts=facts or {},
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int | None = None,
        labels: int | list[int] | torch.Tensor | None = None,
        seed: int = 0,
        noise: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Samples in data units: images in [0, 1], points as they are.

        Args:
            num_samples: how many; None: as many as there is noise, embeddings or labels, else one.
            labels: one class, or one a sample; None: classes in turn. prompt_embeds: [N, L, E], for a network that takes text, instead.
            seed: of the start noise and of what is drawn between calls, as in limbeck's `sample`. noise: [N, *shape] standard normal, instead of drawing it.
            generator: draws between the calls, instead of the seed. batch_size: samples at once.
            output_type: 'pt' (tensor), 'np' or 'pil' (images).

        Raises:
            ValueError: labels, noise or embeddings do not fit.
        """
        given = noise if noise is not None else prompt_embeds if prompt_embeds is not None else labels
        count = num_samples or (1 if given is None or isinstance(given, int) else len(given))
        device, shape = self._execution_device, tuple(self.config.shape)
        if noise is None:
            noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        if noise.shape != (count, *shape):
            raise ValueError(f"The noise must be [{count}, {', '.join(map(str, shape))}], not {list(noise.shape)}.")
        text = isinstance(self.network, UNet2DConditionModel)
        if text and (prompt_embeds is None or len(prompt_embeds) != count):
            raise ValueError(f"This network takes text: give prompt_embeds [{count}, L, E].")
        cond = None if text else self._labels(labels, count)
        later = between(seed, device) if generator is None else generator
        found = []
        for first in range(0, count, batch_size):
            part = slice(first, first + batch_size)
            found.append(
                self._batch(
                    noise[part].to(device),
                    None if cond is None else cond[part].to(device),
                    prompt_embeds[part].to(device) if text and prompt_embeds is not None else None,
                    later,
                )
            )
        samples = self._scaled(torch.cat(found))
        if output_type != "pt":
            samples = samples.cpu().movedim(1, -1).numpy() if len(shape) == 3 else samples.cpu().numpy()
            samples = self.numpy_to_pil(samples) if output_type == "pil" else samples
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)

    def _labels(self, labels: int | list[int] | torch.Tensor | None, count: int) -> torch.Tensor | None:
        classes = self.config.num_classes
        if not classes:
            if labels is not None:
                raise ValueError("This generator has no classes.")
            return None
        chosen = torch.arange(count) % classes if labels is None else torch.as_tensor(labels).reshape(-1).long()
        chosen = chosen.expand(count) if len(chosen) == 1 else chosen
        if len(chosen) != count or int(chosen.min()) < 0 or int(chosen.max()) >= classes:
            raise ValueError(f"Labels are one number, or {count}, from 0 to {classes - 1}.")
        return chosen

    def _batch(self, noise: torch.Tensor, labels: torch.Tensor | None, embeddings: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """[B, *shape] noise → samples in the network's units; sums in float64."""
        x = self.config.start * noise
        for row in self.config.table:
            time = torch.full((len(x),), row["time"], dtype=torch.float32, device=x.device)
            raw = predict(self.network, row["input"] * x, time, labels, embeddings)
            x0 = row["skip"] * x.double() + row["out"] * raw.double()
            x_next = row["keep"] * x.double() + row["signal"] * x0
            if row["noise"]:
                x_next = x_next + row["noise"] * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x_next.to(x.dtype)
        return x

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        spread = (-1, *[1] * (x.dim() - 2))
        found = x * torch.tensor(self.config.std).to(x).view(spread) + torch.tensor(self.config.mean).to(x).view(spread)
        return found.clamp(0, 1) if self.config.bounded else found
