"""What routers choose by: logits in true float32, with noise in training."""

import jax
import jax.numpy as jnp

from moe.model.products import product
from moe.settings import RouterSettings

Keys = dict[str, jax.Array]  # by use, one for each group


def group_keys(key: jax.Array, group_G: jax.Array) -> Keys:
    """Returns keys per group for each use, functions of its global index alone."""
    uses = ("jitter", "route", "noise", "dropout")
    key_GU = jax.vmap(
        lambda g: jax.random.split(jax.random.fold_in(key, g), len(uses))
    )(group_G)
    return {use: key_GU[:, i] for i, use in enumerate(uses)}


def logits_of(
    x_GSM: jax.Array,
    w: dict[str, jax.Array],
    keys: Keys | None,
    settings: RouterSettings,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the logits of each token and expert.

    Args:
        x_GSM: activations; jitter changes what the router sees of them alone.
        w: the router's matrix "router" [M, E], and maybe its "router_bias" [E].
        keys: PRNG keys of each group; None outside training, where nothing is drawn.
        settings: type of the product, jitter and noise.
    Returns:
        logits_GSE in float32, and the same before noise; None where there is none.
    """
    x_GSM = x_GSM.astype(settings.logit_dtype)
    if keys is not None and settings.jitter > 0:
        noise_GSM = jax.vmap(
            lambda k: jax.random.uniform(k, x_GSM.shape[1:], minval=-1, maxval=1)
        )(keys["jitter"])
        x_GSM = (x_GSM * (1 + settings.jitter * noise_GSM)).astype(settings.logit_dtype)
    # On TPU, and with TF32, a plain float32 product would multiply in lower precision.
    logits_GSE = product(
        x_GSM, w["router"], precision=jax.lax.Precision.HIGHEST, result=jnp.float32
    )
    if "router_bias" in w:
        logits_GSE += w["router_bias"].astype(jnp.float32)
    if keys is None or settings.logit_noise == 0:
        return logits_GSE, None
    noise_GSE = jax.vmap(lambda k: jax.random.normal(k, logits_GSE.shape[1:]))(
        keys["noise"]
    )
    num_experts = logits_GSE.shape[-1]
    return logits_GSE + settings.logit_noise / num_experts * noise_GSE, logits_GSE
