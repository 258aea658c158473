"""The runs of `configs/runs`, with the knobs that a mesh of eight devices asks for."""

from launch.config import reader
from launch.config.reader import ResolvedConfig
from moe import architecture


def on_eight_devices(run: str, *knobs: str) -> ResolvedConfig:
    """Reads a run with knobs of a mesh.

    No run is for eight devices: its vocabulary may be odd, its batch too small, its
    groups longer than the cuts of a row.
    """
    settings = reader.read([f"runs/{run}.gin"]).settings
    vocabulary, batch = settings.model.vocab_size, settings.train.batch_size
    more = [f"VOCAB_SIZE={-(-vocabulary // 2) * 2}", f"BATCH_SIZE={max(batch, 16)}"]
    if architecture.has_experts(settings.model):
        more += [f"GROUP_SIZE={min(16, settings.data.length // 4)}", "GROUP_ROWS=1"]
        more += ["ENCODER_GROUP_SIZE=16"] if settings.data.encoder_length else []
    return reader.read([f"runs/{run}.gin"], [*knobs, *more])
