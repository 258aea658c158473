"""A model, a store in memory and Tasks with metrics, ready to be evaluated.

Run as a program, it is one of several processes that evaluate together.
"""

import dataclasses
import functools
import json
import sys
import threading
import types

import jax
import numpy as np
import optax
import pytest

from launch.config.settings import SampleSettings
from launch.evaluation import heldout as evaluation
from launch.evaluation.task_metrics import TaskMetrics
from moe import architecture
from moe.model import inventory, transformer
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.training.scoring import eval_step
from moe.training.train_step import Learner
from partitioning import rules
from partitioning.mesh import make_mesh
from tasks import scoring
from tasks.batches import HeldoutBatches
from tasks.manifest import LanguageManifest, Manifest, SplitManifest, TaskManifest
from tasks.settings import DataSettings

B, L, V = 8, 8, 16
LENGTHS = {"inputs": 4, "targets": 4}
LANGUAGES = ("en", "zh", "")
MODEL = ModelSettings(
    vocab_size=V,
    num_layers=1,
    moe_every=1,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_experts=4,
    expert_mlp_dim=12,
    tie_embeddings=False,
)
EXECUTION = ExecutionSettings(dtype="float32", remat="none")
ROUTER = RouterSettings(num_selected=1, group_size=L)
LAYERS = architecture.describe(MODEL, ROUTER)
DATA = DataSettings(
    mixture_or_task_name="mixed",
    mixture_or_task_module="nowhere",
    task_feature_lengths=LENGTHS,
    store_dir="",
    objective="seq2seq",
)


class Vocabulary:
    """Ids 2 to 11 are letters, and 1 ends."""

    size, extra_ids, eos_id, has_padding = 12, 0, 1, True

    def decode(self, ids):
        return "".join("..abcdefghij"[i] for i in ids if i > 1)


@dataclasses.dataclass
class Split:
    """As `tasks.store.Split`."""

    documents: dict
    language_D: np.ndarray | None
    manifest: SplitManifest
    vocabulary = Vocabulary()

    @property
    def features(self):
        return tuple(self.documents)

    @property
    def num_documents(self):
        return len(self.documents["targets"])

    @property
    def language_names(self):
        return tuple(self.manifest.languages)

    def num_tokens(self, feature="targets"):
        return sum(map(len, self.documents[feature]))

    def offsets(self, feature="targets"):
        return np.cumsum([0, *map(len, self.documents[feature])])

    def read(self, feature, starts, stops):
        tokens = np.concatenate(self.documents[feature])
        return [tokens[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def languages(self):
        return self.language_D

    def pack(self, key, compute):
        return compute()


def make_split(documents: int, seed: int, *, languages: bool) -> Split:
    """Pairs of which some are cut; two bytes a token, three in the first language."""
    rng = np.random.default_rng(seed)
    made = {
        feature: [
            np.append(rng.integers(2, 12, rng.integers(1, 5)), 1)
            for _ in range(documents)
        ]
        for feature in LENGTHS
    }
    language_D, known, text_bytes = None, {}, 0
    if languages:
        language_D = rng.integers(0, len(LANGUAGES), documents).astype(np.uint16)
        for number, name in enumerate(LANGUAGES):
            tokens = sum(
                len(made["targets"][d]) for d in np.flatnonzero(language_D == number)
            )
            known[name] = LanguageManifest(1, tokens, tokens * (2 + (number == 0)))
    tokens = {feature: sum(map(len, made[feature])) for feature in made}
    text_bytes = sum(language.text_bytes for language in known.values())
    counts = SplitManifest(
        documents, tokens, text_bytes or 2 * tokens["targets"], "", languages=known
    )
    return Split(made, language_D, counts)


SPLITS = {
    "many": make_split(11, 0, languages=True),
    "few": make_split(3, 1, languages=False),
}


class Store:
    """As `tasks.store.TokenStore`."""

    tasks = tuple(SPLITS)
    vocabulary = Vocabulary()
    manifest = Manifest(
        name="mixed",
        vocabulary="bytes",
        vocabulary_size=12,
        vocabulary_fingerprint="",
        extra_ids=0,
        train_split="train",
        heldout_split="validation",
        tasks={
            name: TaskManifest(
                {"validation": split.manifest},
                1.0,
                {f"{b}_bits_per_byte": 4.0 for b in ("unigram", "gzip", "xz")},
            )
            for name, split in SPLITS.items()
        },
        filters={},
    )

    def split(self, task, split):
        assert split == "validation"
        return SPLITS[task]


@dataclasses.dataclass
class Task:
    """As `tasks.scoring.ScoredTask`, without SeqIO."""

    name: str
    predicts: bool
    notes: tuple = ()

    def __post_init__(self):
        split = SPLITS[self.name]
        self.examples = [{} for _ in range(split.num_documents)]
        self.inputs, self.targets = (
            [ids[:4] for ids in split.documents[feature]] for feature in LENGTHS
        )

    def metrics(self, predicted, score_N):
        place_N = 1 + np.arange(len(score_N))
        found = {"score": float(score_N @ place_N)}
        if predicted is not None:
            found["ids"] = float(np.array([sum(ids) for ids in predicted]) @ place_N)
        return found

    def records(self, predicted, score_N):
        for i, score in enumerate(score_N):
            yield {"index": i, "prediction": predicted and predicted[i], "score": score}


TASKS = [Task("many", predicts=True), Task("few", predicts=False, notes=("left out",))]


@functools.cache
def parameters():
    """Weights large enough for tokens, positions and experts to matter."""
    specs = inventory.specs(LAYERS)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), specs
    )


def model_of(mesh: str) -> transformer.Model:
    return build(MODEL, ROUTER, EXECUTION, make_mesh(MESHES[mesh]))


def make_learner(mesh: str) -> Learner:
    """What scores; it is never asked to learn."""
    nothing = optax.identity()
    return Learner(model_of(mesh), nothing, lambda _: 0.0, LossSettings(), 1, seed=0)


def make_run(mesh: str, model_dir, data: DataSettings = DATA):
    """What evaluation reads of a `launch.run.assemble.Run`."""
    model = model_of(mesh)
    settings = types.SimpleNamespace(
        data=data,
        layers=LAYERS,
        loss=LossSettings(),
        train=types.SimpleNamespace(batch_size=B, microbatches=1, seed=0),
        loop=types.SimpleNamespace(model_dir=str(model_dir)),
        sample=SampleSettings(),
    )
    return types.SimpleNamespace(
        settings=settings,
        mesh=model.execution.mesh,
        learner=make_learner(mesh),
        batch_sharding=rules.sharding(model.execution.mesh, ("batch", "length")),
    )


@functools.cache
def compiled_eval_step(mesh: str):
    learner = make_learner(mesh)
    return jax.jit(
        functools.partial(eval_step, learner=learner),
        out_shardings=rules.replicated(learner.model.execution.mesh),
    )


def heldout(mesh: str, data: DataSettings = DATA, num_batches: int = 0):
    run = make_run(mesh, "", data)
    with jax.set_mesh(run.mesh):
        return evaluation.heldout(
            run, Store(), parameters(), compiled_eval_step(mesh), num_batches
        )


def note_documents(patch: pytest.MonkeyPatch) -> set[tuple[threading.Thread, int]]:
    """Notes which thread asks for the documents of which rows of a batch."""
    noted, documents = set(), HeldoutBatches.documents

    def note(held, index, start, stop):
        noted.update((threading.current_thread(), row) for row in range(start, stop))
        return documents(held, index, start, stop)

    patch.setattr(HeldoutBatches, "documents", note)
    return noted


def task_metrics(mesh: str, model_dir) -> TaskMetrics:
    return TaskMetrics(
        make_run(mesh, model_dir), Store(), lambda: compiled_eval_step(mesh)
    )


def main(process: int, processes: int, port: str, model_dir: str) -> None:
    """Prints what one of several processes finds, twice."""
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, processes, process, coordinator_bind_address=address
    )
    scoring.load = lambda *_: TASKS
    metrics = task_metrics("d4e2", model_dir)
    with pytest.MonkeyPatch.context() as patch:
        read = note_documents(patch)
        found = heldout("d4e2")
    assert len({row for _, row in read}) == B // processes, "those of its own devices"
    with jax.set_mesh(make_mesh(MESHES["d4e2"])):
        first = metrics(parameters(), 5)
        assert metrics(parameters(), 6) == first
    print(json.dumps(found | first))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
