"""One process of a job that feeds its devices: run by `test_streams.py`.

Its argument is the list of what `main` takes, in JSON.
"""

import hashlib
import json
import sys
import time

import jax

jax.config.update("jax_platforms", "cpu")


def main(
    store_dir: str,
    rates: dict[str, float],
    shape: tuple[int, int],
    job: tuple[int, int, int],
    span: tuple[int, int],
    seconds: float,
    out: str,
) -> None:
    """Writes a line for each batch: its number, a digest of the whole, and of rows."""
    port, number, process = job
    jax.config.update("jax_num_cpu_devices", 8 // number)
    if number > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            number,
            process,
            coordinator_bind_address=f"127.0.0.1:{port}",
            heartbeat_timeout_seconds=10,
        )
    import jax.numpy as jnp
    import numpy as np

    from launch.run.feed import Feed
    from partitioning import rules
    from partitioning.mesh import make_mesh
    from partitioning.settings import MeshSettings
    from tasks import batches, store
    from tasks.settings import DataSettings, MixtureSettings

    B, L = shape
    data = DataSettings("made_up", "none", {"targets": L}, store_dir)
    mixture = MixtureSettings(rates=rates)
    opened = store.open_store(store_dir)
    read = batches.training(opened, data, mixture, batch_size=B, seed=5).read
    mesh = make_mesh(MeshSettings(data=4, expert=2))
    sharding = rules.sharding(mesh, ("batch", "length"))
    weight_BL = np.arange(B * L).reshape(B, L) % 9973
    total = jax.jit(
        lambda x_BL: jnp.sum(x_BL * weight_BL), out_shardings=rules.replicated(mesh)
    )
    start, stop = span
    feed = Feed(read, start=start, stop=stop, shape=(B, L), sharding=sharding)
    with feed, open(out, "a") as file:
        for index, batch in enumerate(feed, start=start):
            target_BL = batch["decoder_target_tokens"]
            whole = int(total(target_BL))
            rows = {}
            for shard in target_BL.addressable_shards:
                first = shard.index[0].start or 0
                for place, row in enumerate(np.asarray(shard.data), start=first):
                    rows[place] = hashlib.sha256(row.tobytes()).hexdigest()[:16]
            file.write(json.dumps([index, whole, rows]) + "\n")
            file.flush()
            time.sleep(seconds)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
