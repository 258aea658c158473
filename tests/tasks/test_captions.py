"""Images before text: what is stored, what rows hold, and what is refused."""

import dataclasses

import numpy as np
import pytest
from memory_store import VOCABULARY, MemorySplit, MemoryStore, documents, settings

from tasks import layouts
from tasks.batches import heldout, training
from tasks.errors import StoreError
from tasks.settings import FilterSettings, MixtureSettings, problems

SIZE, PATCHES, L = 4, 4, 20
N = SIZE * SIZE * 3
CAPTIONS = settings(
    "captions", task_feature_lengths={"targets": L}, image_size=SIZE, patch_size=2
)


def store_of(number: int = 13) -> MemoryStore:
    """Captions of 2 to 30 tokens, so that some are cut."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, N).astype(np.uint16) for _ in range(number)]
    text = documents(number, 3, longest=30)
    assert min(map(len, text)) < L - PATCHES < max(map(len, text))
    split = MemorySplit({"images": images, "targets": text})
    return MemoryStore({"task": {"train": split, "validation": split}})


@pytest.mark.fast
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_rows_are_patches_and_then_the_text(attention):
    data = dataclasses.replace(CAPTIONS, prefix_attention=attention)
    store, number = store_of(), 13
    held = heldout(store, "task", data, batch_size=16, seed=0)
    batch, documents_BL = held.read(0, 0, 16), held.documents(0, 0, 16)
    split = store.split("task", "validation").documents
    assert {name: x.shape[1] for name, x in batch.items()} == held.features
    for row in range(number):
        text = split["targets"][row][: L - PATCHES]
        end = PATCHES + len(text)
        wanted = {name: [0] * L for name in layouts.FEATURES}
        for place in range(end):
            wanted["decoder_segment_ids"][place] = 1
            wanted["decoder_positions"][place] = place
            if place >= PATCHES:
                wanted["decoder_loss_weights"][place] = 1
                wanted["decoder_target_tokens"][place] = text[place - PATCHES]
            if place > PATCHES:
                wanted["decoder_input_tokens"][place] = text[place - PATCHES - 1]
        for name, values in wanted.items():
            assert batch[name][row].tolist() == values, name
        np.testing.assert_array_equal(
            batch["decoder_images"][row], split["images"][row]
        )
        if attention == "bidirectional":
            sees = batch["decoder_causal_attention"][row].tolist()
            assert sees == [1] * PATCHES + [0] * (L - PATCHES)
        of = documents_BL[row]
        assert of.tolist() == [-1] * PATCHES + [row] * len(text) + [-1] * (L - end)
    assert {n: x.dtype.name for n, x in batch.items()} == {
        name: layouts.type_of(name) for name in held.features
    }
    assert batch["decoder_images"].dtype == np.uint8
    assert not any(array[number:].any() for array in batch.values())


@pytest.mark.fast
def test_batches_mix_images_with_their_own_text():
    batches = training(store_of(), CAPTIONS, MixtureSettings(), batch_size=8, seed=1)
    split = store_of().split("task", "train").documents
    whole = batches.read(2, 0, 8)
    for row in range(8):
        (which,) = [
            n
            for n, image in enumerate(split["images"])
            if (image == whole["decoder_images"][row]).all()
        ]
        text = split["targets"][which][: L - PATCHES]
        found = whole["decoder_target_tokens"][row, PATCHES : PATCHES + len(text)]
        np.testing.assert_array_equal(found, text)
    for name, part in batches.read(2, 3, 5).items():
        np.testing.assert_array_equal(part, whole[name][3:5])


@pytest.mark.fast
def test_what_rows_hold_and_lose_is_counted():
    (task,) = training(
        store_of(), CAPTIONS, MixtureSettings(), batch_size=8, seed=1
    ).tasks
    lengths = [len(text) for text in task.part.documents["targets"]]
    kept = [min(length, L - PATCHES) for length in lengths]
    assert (task.num_rows, task.num_tokens) == (13, sum(kept))
    assert task.truncation.tokens == {"targets": sum(lengths) - sum(kept)}
    assert task.truncation.examples == sum(n > L - PATCHES for n in lengths)
    held = sum(kept) + 13 * PATCHES
    assert task.padding_fraction == pytest.approx(1 - held / (13 * L))
    assert task.stored_tokens == sum(lengths)


@pytest.mark.fast
def test_images_of_another_size_are_refused():
    data = dataclasses.replace(CAPTIONS, image_channels=1)
    batches = training(store_of(), data, MixtureSettings(), batch_size=8, seed=1)
    with pytest.raises(StoreError, match=f"image 0 of 'task' has {N} numbers, and"):
        batches.read(0, 0, 8)
    text = MemoryStore({"task": {"train": MemorySplit({"targets": documents(5, 1)})}})
    with pytest.raises(StoreError, match="'captions' needs the features 'images'"):
        training(text, CAPTIONS, MixtureSettings(), batch_size=8, seed=1)


@pytest.mark.fast
def test_settings_that_do_not_go_with_images_are_refused():
    assert not problems(CAPTIONS)
    for changes in ({"image_size": 0}, {"objective": "causal_lm"}):
        (found,) = problems(dataclasses.replace(CAPTIONS, **changes))
        assert "'captions' are learnt after images" in found
    near = problems(CAPTIONS, filters=FilterSettings(duplicates="near"))
    assert near[0].startswith("DUPLICATES = 'near' looks at text alone")
    assert not problems(CAPTIONS, filters=FilterSettings(duplicates="exact"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A function that prepares made-up images, the same twice, one caption for all."""
    from tasks import factories
    from tasks.prepare import prepare
    from tasks.sources import Document
    from tasks.store import open_store

    def made(split: str):
        for number in (0, 1, 1, 2):
            image = bytes(
                (number * 50 + n + (split == "train")) % 256 for n in range(N)
            )
            features = {"images": image, "targets": b"a thing"}
            yield Document(features, f"{split}/{number}")

    splits = {split: (lambda s=split: made(s)) for split in ("train", "validation")}
    features = ("images", "targets")
    factories.add_documents("made_up_images", splits, features=features)

    def run(duplicates: str = "keep", **changes):
        data = dataclasses.replace(
            CAPTIONS,
            mixture_or_task_name="made_up_images",
            mixture_or_task_module="tasks.factories",
            vocabulary="bytes",
            store_dir=str(tmp_path_factory.mktemp("images") / "store"),
            **changes,
        )
        filters = FilterSettings(duplicates=duplicates)
        prepare(data, filters=filters)
        return open_store(data.store_dir, data, filters), list(made("train"))

    return run


def test_a_store_keeps_images_beside_their_text(prepared):
    store, made = prepared()
    part = store.split("made_up_images", "train")
    assert part.features == ("images", "targets")
    images = part.read(
        "images", [n * N for n in range(4)], [n * N + N for n in range(4)]
    )
    assert [image.tobytes() for image in images] == [d.features["images"] for d in made]
    assert part.read("images", [0], [N])[0].dtype == np.uint8
    assert [part.document("targets", n) for n in range(4)] == ["a thing"] * 4
    batch = training(store, CAPTIONS, MixtureSettings(), batch_size=4, seed=0).read(
        0, 0, 4
    )
    text = VOCABULARY.decode(batch["decoder_target_tokens"][0].tolist())
    assert text == "a thing"


def test_copies_are_of_image_and_text(prepared):
    store, _ = prepared("exact")
    split = store.manifest.split("made_up_images", "train")
    assert (split.documents, split.removed) == (3, {"exact_duplicates": 1})


def test_a_preparation_refuses_images_of_another_size(prepared):
    with pytest.raises(
        StoreError, match="has an image of 48 bytes, and IMAGE_SIZE = 8"
    ):
        prepared(image_size=8, task_feature_lengths={"targets": 40})
