"""D^2epth's training step here and in torch, each measured in a process of its own.

What tests/train_speed.py compares; its requests go through d3epth_jax.bench.worker.
"""

import time

from d3epth_jax.bench.worker import serve

BATCH, HEIGHT, WIDTH = 1, 384, 512
LEARNING_RATE, DECAY, CLIP = 3e-5, 0.999, 1.0


def make_batch() -> dict:
    import numpy as np

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
    depth = np.broadcast_to((2 + x + y + np.sin(9 * x * y))[None, ..., None], (BATCH, *x.shape, 1))
    return {
        "image": rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3)).astype(np.uint8),
        "depth": depth.astype(np.float32),
        "mask": np.ones(depth.shape, bool),
    }


def ours(parts: bool) -> dict:
    """{name: a function that runs it once and waits}: the step, and with `parts` its networks."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from d3epth_jax import sharding, weighting
    from d3epth_jax.models.depth_model import init_params
    from d3epth_jax.training import optim, steps
    from d3epth_jax.training.stages import pixel
    from d3epth_jax.training.train_state import init_train_state, split_trainable
    from d3epth_jax.weights import fold
    from tests.cache_speed import quarter

    model = quarter("d2_base")
    trainable, rest = split_trainable(init_params(model, 0), ("unet/",))
    model, rest = fold.fold_frozen(model, trainable, rest)
    tx = optim.make_optimizer(lambda _: LEARNING_RATE, clip=CLIP)
    tasks, beta = weighting.static(1), {"ssi": 1.0}
    loss_fn = pixel.make_loss(model, terms=tuple(beta))
    step = jax.jit(
        steps.make_train_step(loss_fn, tx, tasks, beta=beta, tasks=("ssi",), max_ema_decay=DECAY),
        donate_argnums=0,
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    frozen = sharding.put_params({"rest": rest, "teacher": None}, mesh)
    batch = sharding.put_batch(make_batch(), mesh)
    trainable = sharding.put_params(trainable, mesh)
    held = [jax.jit(lambda p: init_train_state(p, tx, tasks))(trainable)]

    def run_step():
        held[0], metrics = step(held[0], frozen, batch)
        assert np.isfinite(jax.block_until_ready(metrics)["loss"])

    runs = {"step": run_step}
    if not parts:
        return runs
    latent = jnp.ones((BATCH, HEIGHT // 8, WIDTH // 8, 4))
    image = jnp.ones((BATCH, HEIGHT, WIDTH, 3))
    sample, prompt = jnp.concatenate([latent, latent], -1), rest["prompt"]
    encoder, unet, decoder = (model.modules[name] for name in ("encoder", "unet", "decoder"))
    of_unet = jax.tree.map(jnp.copy, held[0].params["unet"])

    def loss_of_unet(params):
        return jnp.sum(jnp.square(unet.apply({"params": params}, sample, 999, prompt)[0]))

    def loss_of_decoder(params, latent):
        return jnp.sum(jnp.square(decoder.apply({"params": params}, latent)))

    encode = jax.jit(lambda params: encoder.apply({"params": params}, image))
    train_unet, forward_unet = jax.jit(jax.value_and_grad(loss_of_unet)), jax.jit(loss_of_unet)
    through_decoder = jax.jit(jax.value_and_grad(loss_of_decoder, argnums=1))
    decode = jax.jit(loss_of_decoder)
    of_rest = frozen["rest"]
    calls = {
        "encoder": lambda: encode(of_rest["encoder"]),
        "UNet": lambda: forward_unet(of_unet),
        "UNet, trained": lambda: train_unet(of_unet),
        "decoder": lambda: decode(of_rest["decoder"], latent),
        "decoder, gradient": lambda: through_decoder(of_rest["decoder"], latent),
    }
    waited = {name: lambda f=f: jax.block_until_ready(f()) for name, f in calls.items()}
    return runs | waited


def torchs(parts: bool, channels_last: bool) -> dict:
    """As `ours`, with diffusers' modules; on a GPU where there is one, as JAX does."""
    import diffusers
    import torch

    from tests.cache_speed import quarter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(2)
    torch.manual_seed(0)
    # As XLA: it tries kernels out too, and multiplies float32 in TF32.
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    model = quarter("d2_base")
    unet = diffusers.UNet2DConditionModel.from_config(model.unet.to_dict()).train()
    vae = diffusers.AutoencoderKL.from_config(model.autoencoder.to_dict()).eval()
    vae.requires_grad_(False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet.to(device, memory_format=layout), vae.to(device, memory_format=layout)
    scale = vae.config.scaling_factor
    params = list(unet.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, weight_decay=1e-2, fused=True)
    picture, depth = (
        torch.from_numpy(x).to(device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        for x in (make_batch()["image"], make_batch()["depth"])
    )
    prompt = torch.zeros(BATCH, 2, model.unet.cross_attention_dim, device=device)

    def step():
        image = picture.float() / 127.5 - 1
        with torch.no_grad():
            rgb = vae.encode(image).latent_dist.mode() * scale
        sample = torch.cat([rgb, torch.zeros_like(rgb)], 1)
        latent = -unet(sample, 999, prompt).sample
        decoded = vae.decode(latent / scale).sample.mean(1, keepdim=True).clamp(-1, 1)
        loss = ssi(decoded.flatten(1), normalized(depth.flatten(1)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - DECAY)
        assert torch.isfinite(loss)

    def normalized(d):
        low, high = (torch.quantile(d, q, 1, keepdim=True) for q in (0.02, 0.98))
        return (2 * (d - low) / (high - low) - 1).clamp(-1, 1)

    def ssi(p, d):
        p, d = p - p.mean(1, keepdim=True), d - d.mean(1, keepdim=True)
        s = (p * d).sum(1, keepdim=True) / p.square().sum(1, keepdim=True).clamp(min=1e-12)
        return (s * p - d).abs().mean()

    runs = {"step": step}
    if not parts:
        return runs
    latent, image = (
        torch.ones(shape, device=device).contiguous(memory_format=layout)
        for shape in ((BATCH, 4, HEIGHT // 8, WIDTH // 8), (BATCH, 3, HEIGHT, WIDTH))
    )
    sample = torch.cat([latent, latent], 1)

    @torch.no_grad()
    def encode():
        vae.encode(image)

    def run_unet():
        return unet(sample, 999, prompt).sample.square().sum()

    def train_unet():
        run_unet().backward()
        optimizer.zero_grad(set_to_none=True)

    def through_decoder():
        vae.decode(latent.clone().requires_grad_()).sample.square().sum().backward()

    calls = {
        "encoder": encode,
        "UNet": torch.no_grad()(run_unet),
        "UNet, trained": train_unet,
        "decoder": torch.no_grad()(lambda: vae.decode(latent)),
        "decoder, gradient": through_decoder,
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return runs | {name: lambda f=f: (f(), wait()) for name, f in calls.items()}


def device_of(way: str) -> str:
    if way == "ours":
        import jax

        return jax.default_backend()
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


class Step:
    """One way to compute the step; the methods are the requests."""

    def open(self, way: str, parts: bool) -> dict:
        """Names of what can be run, and the kind of device that it runs on."""
        make = {
            "ours": ours,
            "torch": lambda parts: torchs(parts, channels_last=False),
            "torch, channels_last": lambda parts: torchs(parts, channels_last=True),
        }[way]
        self.runs = make(parts)
        return {"names": list(self.runs), "device": device_of(way)}

    def run(self, name: str) -> dict:
        wall, processor = time.perf_counter(), time.process_time()
        self.runs[name]()
        return {
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
        }


if __name__ == "__main__":
    step = Step()
    serve({"open": step.open, "run": step.run})
