"""What docs/extending.md adds works as it stands there, on one device and on eight."""

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_store import text_store

from launch import cli, commands
from launch.config import reader
from launch.run import user_code
from moe import architecture
from moe.dispatch import auto
from moe.layers import Sublayer
from moe.model import block, inventory, sparse, transformer
from moe.model.execution import Execution
from moe.model.view import Routed
from moe.routing.assignment import RouterContext
from moe.settings import (
    DenseSettings,
    ExecutionSettings,
    ModelSettings,
    RouterSettings,
    SparseSettings,
)
from moe.testing import check_assignment
from moe.testing.whole_arrays import forward, layer
from tasks.batches import training
from tasks.settings import MixtureSettings

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
B, L, M, E = 8, 8, 8, 8


def python_of_page() -> list[tuple[str, str]]:
    """Path and text of every module of the page."""
    return re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """A folder with the modules of the user's that the page has, and its gin lines."""
    modules = [(p, text) for p, text in python_of_page() if p.startswith("my_lab/")]
    assert [path for path, _ in modules] == [
        "my_lab/routers.py",
        "my_lab/optim.py",
        "my_lab/objectives.py",
    ]
    (tmp_path / "my_lab").mkdir()
    for path, text in modules:
        (tmp_path / path).write_text(text, encoding="utf-8")
    gin = re.findall(r"```gin\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.gin").write_text("\n".join(gin), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The modules of the page, by the name of their file."""
    found = {}
    for path, text in python_of_page():
        if path.startswith("my_lab/"):
            continue
        file = tmp_path_factory.mktemp("page") / Path(path).name
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"page_{file.stem}", file)
        found[file.stem] = sys.modules[spec.name] = importlib.util.module_from_spec(
            spec
        )
        spec.loader.exec_module(found[file.stem])
    assert found.keys() == {"round_robin", "gathered", "adapter", "count"}
    return found


def run_layer(meshes, mesh: str, router: RouterSettings, transport: str):
    """Output and gradients of a sparse layer."""
    s = SparseSettings(E, DenseSettings(12, "gelu"), router)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda spec: rng.normal(size=spec.shape).astype(np.float32), sparse.specs(s, M)
    )
    x_BLM = rng.normal(size=(B, L, M)).astype(np.float32)
    settings = ExecutionSettings(dtype="float32", transport=transport)
    execution = Execution(settings, meshes[mesh])
    ones_BL = jnp.ones((B, L), jnp.int32)
    routed = Routed(ones_BL > 0, ones_BL, jnp.arange(B))

    @jax.jit
    @jax.value_and_grad
    def run(weights):
        key = jax.random.key(0)
        y_BLM, _ = layer(weights, x_BLM, routed, key, 0, s, execution)
        return jnp.sum(y_BLM**2)

    with jax.set_mesh(execution.mesh):
        return jax.device_get(run(weights))


def assert_close(actual, expected) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        actual,
        expected,
    )


def test_the_router_of_the_page(written, meshes, monkeypatch):
    monkeypatch.setitem(sys.modules, "moe.routing.round_robin", written["round_robin"])
    router = RouterSettings(
        family="round_robin", num_selected=2, group_size=L, capacity_factor=1.0
    )
    mask_GS = np.arange(3 * L).reshape(3, L) % 5 > 0
    logits_GSE = np.random.default_rng(0).normal(size=(3, L, E)).astype(np.float32)
    assignment = sparse.route_of(router)(
        logits_GSE, RouterContext(jnp.asarray(mask_GS)), router, capacity=4
    )
    check_assignment(assignment, mask_GS)
    one, eight = (run_layer(meshes, m, router, "all_to_all") for m in ("d1", "d2e4"))
    assert_close(eight, one)


def test_the_router_of_the_users_own(my_lab, meshes):
    config = reader.read(["runs/tiny.gin", "mine.gin"], [f"GROUP_SIZE={L}"])
    assert config.settings.router.own is None, "reading imports nothing"
    router = user_code.admitted(config, allowed=True).settings.router
    assert router.options == {"tau": 0.3}
    one, eight = (run_layer(meshes, m, router, "all_to_all") for m in ("d1", "d2e4"))
    assert_close(eight, one)
    plain = dataclasses.replace(router, family="token_choice", own=None, options={})
    other = run_layer(meshes, "d1", plain, "all_to_all")
    assert abs(other[0] - one[0]) > 1, "tau tells"


def test_the_objective_of_the_users_own(my_lab):
    config = reader.read(["runs/tiny.gin", "mine.gin"], [])
    data = user_code.admitted(config, allowed=True).settings.data
    store = text_store(a=40)
    batches = training(store, data, MixtureSettings(), batch_size=8, seed=0)
    (rows,) = batches.tasks
    V, L = store.vocabulary.size, data.length
    assert rows.padding_fraction < 0.1
    middles = set()
    for row in range(rows.num_rows - 1):
        one = np.asarray([row])
        batch = rows.read(one, one * 0, 0)
        tokens_L = batch["decoder_target_tokens"][0]
        begin, end, middle = (
            int(np.flatnonzero(tokens_L == V - 1 - i)[0]) for i in range(3)
        )
        assert begin == 0
        asked = batch["decoder_loss_weights"][0].astype(bool)
        np.testing.assert_array_equal(asked, np.arange(L) > middle)
        assert tokens_L[-1] == store.vocabulary.eos_id
        whole = [tokens_L[1:end], tokens_L[middle + 1 : -1], tokens_L[end + 1 : middle]]
        bounds = rows.index.bounds(row)
        stored = rows.part.read("targets", [bounds[0]], [bounds[-1]])[0]
        np.testing.assert_array_equal(np.concatenate(whole), stored)
        middles.add(len(whole[1]))
    assert len(middles) > 10, "cuts differ"


@pytest.mark.slow
def test_all_that_is_the_users_own_is_the_same_on_eight_devices(
    my_lab, monkeypatch, capsys
):
    monkeypatch.setattr(
        "launch.config.platform.prepare_environment", lambda platform: []
    )
    words = ["--gin_file=runs/tiny.gin", "--gin_file=mine.gin"]
    words += ["--mesh=data=2,expert=4", "--gin.NUM_LAYERS=1", "--gin.MOE_EVERY=1"]
    assert cli.main(["verify", *words]) == 1
    refused = capsys.readouterr().err
    assert refused.count("add --allow_module to the command") == 4
    assert "my_lab.routers" not in sys.modules
    assert cli.main(["verify", *words, "--allow_module"]) == 0, capsys.readouterr().err


def test_the_transport_of_the_page(written, meshes, monkeypatch):
    monkeypatch.setitem(sys.modules, "moe.dispatch.gathered", written["gathered"])
    monkeypatch.setattr(auto, "PADDED", (*auto.PADDED, "gathered"))
    router = RouterSettings(num_selected=2, group_size=L, capacity_factor=1.0)
    wanted = run_layer(meshes, "d1", router, "einsum")
    for mesh in ("d1", "d2e4"):
        assert_close(run_layer(meshes, mesh, router, "gathered"), wanted)


def test_the_sublayer_of_the_page(written, meshes, monkeypatch):
    adapter = written["adapter"]
    monkeypatch.setitem(block.KINDS, "adapter", adapter)
    model = ModelSettings(
        vocab_size=16,
        num_layers=2,
        model_dim=M,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        moe_every=0,
    )
    layers = architecture.describe(model, RouterSettings())
    (segment,) = layers.decoder.segments
    ((attention, dense),) = segment.blocks
    added = Sublayer("adapter", "adapter", adapter.AdapterSettings(4), attention.norm)
    segment = segment._replace(blocks=((attention, dense, added),))
    layers = layers._replace(decoder=layers.decoder._replace(segments=(segment,)))
    tokens_BL = np.arange(B * L, dtype=np.int32).reshape(B, L) % 16
    batch = {
        "decoder_input_tokens": tokens_BL,
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        "decoder_segment_ids": np.ones((B, L), np.int32),
    }
    params = inventory.draw(layers, jax.random.key(0), "float32")
    ((drawn,),) = params["decoder"]["layers"]
    assert not drawn["adapter"]["up"].any(), "it starts out as nothing"

    def logits(mesh: str, params, layers=layers):
        settings = ExecutionSettings(dtype="float32")
        model = transformer.Model(layers, Execution(settings, meshes[mesh]))
        with jax.set_mesh(meshes[mesh]):
            run = jax.jit(lambda params: forward(model, params, batch, np.arange(B))[0])
            return jax.device_get(run(params))

    before = logits("d1", params)
    drawn["adapter"]["up"] = jnp.ones_like(drawn["adapter"]["up"])
    after = logits("d1", params)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(logits("d2e2m2", params), after, rtol=1e-4, atol=1e-4)


def test_a_verb_of_another_package_is_found(written, monkeypatch, capsys):
    entry = importlib.metadata.EntryPoint(
        "count", written["count"].__name__, "switchyard.commands"
    )
    other = importlib.metadata.EntryPoint("train", entry.value, entry.group)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry, other]
    )
    assert commands.modules()["train"] == "launch.commands.train"
    assert cli.main(["count", "--gin_file=runs/demo.gin"]) == 0
    assert cli.main(["count", "--gin_file=runs/demo.gin", "--active"]) == 0
    assert capsys.readouterr().out.split() == ["3148928", "1313920"]
    assert cli.main(["--help"]) == 0
    assert re.search("count +count the parameters", capsys.readouterr().out)


def test_a_verb_of_another_package_that_is_broken_is_told(monkeypatch, capsys):
    entries = [
        importlib.metadata.EntryPoint(name, module, "switchyard.commands")
        for name, module in (("gone", "not_there"), ("odd", "moe.layers"))
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search("train +train a model", shown)
    assert re.search("gone +cannot be imported: ModuleNotFoundError: No mod", shown)
    assert re.search("odd +cannot be used: moe.layers has no COMMAND", shown)
    assert cli.main(["gone"]) == 1
    said = "UsageError: gone, a verb of another package, cannot be imported: Module"
    assert capsys.readouterr().err.startswith(said)
