"""What a run is, in words: for the terminal, dry runs and reports."""

import itertools

import jax

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.data import opening
from launch.data.opening import cut_words
from launch.run import attention_check
from launch.run.assemble import Run
from launch.terminal.lines import compact
from moe import architecture, expected_drops
from moe.accounting import count
from moe.dispatch import auto
from moe.model import inventory
from moe.model.feed_forward import grouped_method
from moe.routing.capacity import capacity, mean_choices, never_drops
from moe.rules.routers import leaks
from moe.settings import RouterSettings, SparseSettings
from moe.training import trained
from partitioning.mesh import describe
from tasks.store import TokenStore

_MOST_TASKS = 8  # whose shares are named


def facts(
    config: ResolvedConfig, run: Run, store: TokenStore | None
) -> list[tuple[str, str]]:
    """Says in a few lines what the run is, and of its data if they are there."""
    settings = config.settings
    model, train = settings.model, settings.train
    counts = count(settings.layers, settings.data.length, settings.data.encoder_length)
    rows, per_row = settings.batch_sizes, settings.data.tokens_per_row
    tokens, all_rows = train.batch_size * per_row, rows.before(train.train_steps)
    growing = f"{rows.of(0) * per_row:,} to " if train.batch_ramp else ""
    lines = [
        (
            "parameters",
            f"{counts.total:,} total, {counts.active:,} active per token"
            + ", those of layers shared" * (model.layer_sharing == "all")
            + (f"; {counts.ahead:,} more look ahead in training" * (counts.ahead > 0)),
        ),
        (
            "FLOPs per token",
            f"{compact(counts.forward_flops_per_token)} forward, "
            f"{compact(counts.train_flops_per_token)} in training; slots of fixed "
            "capacity would make the forward pass "
            f"{compact(counts.executed_forward_flops_per_token)}",
        ),
        ("mesh", f"{describe(settings.mesh)} ({run.mesh.devices.flat[0].platform})"),
        (
            "tokens",
            f"{growing}{tokens:,} a step in {train.microbatches} microbatch(es), "
            f"{compact(all_rows * per_row)} in {train.train_steps:,} steps",
        ),
        *data_facts(settings, store),
        ("attention", _describe_attention(run)),
    ]
    lines += trained_facts(settings)
    if architecture.has_experts(model):
        lines += sparse_facts(settings, run.mesh)
    return lines


def trained_facts(settings: Settings) -> list[tuple[str, str]]:
    """How many of the parameters are trained, where some are not."""
    optimizer = settings.optimizer
    if not (optimizer.trainable or optimizer.frozen):
        return []
    some, all_ = trained.counted(inventory.specs(settings.layers), optimizer)
    return [("trained", f"{some:,} of {all_:,} parameters; the rest is frozen")]


def data_facts(settings: Settings, store: TokenStore | None) -> list[tuple[str, str]]:
    """What a row is, and what a prepared store and its mixture hold.

    Raises:
        StoreError: the store does not suit the objective or the mixture.
    """
    data = settings.data
    each = ", ".join(f"{name} {n}" for name, n in data.task_feature_lengths.items())
    words = data.objective
    if data.objective_options:
        words += f" with {dict(data.objective_options)}"
    if data.layout == "encoder_decoder":
        words += f", rows of {each} tokens"
    else:
        words += f", rows of {data.length:,} tokens ({each})"
    if data.asks and data.asks.packs:
        words += f", packing {data.packing}"
    if data.prefix_attention == "bidirectional":
        words += ", what is given sees itself whole"
    lines = [("objective", words)]
    if store is None:
        return [*lines, ("data", f"{data.store_dir} is not prepared yet")]
    read = opening.training_batches(store, settings)  # makes no pack index
    sizes = [task.stored_tokens for task in read.tasks]
    words = f"{compact(sum(sizes))} tokens in an epoch"
    if len(sizes) == 1:
        return [*lines, ("data", words + cut_words(read))]
    words += f" of {len(sizes)} Tasks{cut_words(read)}"
    lines.append(("data", words))
    shares = []
    for task, share in zip(read.tasks, read.mixture.shares.T, strict=True):
        knots = [f"{100 * part:.3g} %" for part in share]
        changes = [knot for knot, _ in itertools.groupby(knots)]
        shares.append(f"{task.task} {' → '.join(changes)}")
    if len(shares) > _MOST_TASKS:
        shares[_MOST_TASKS:] = [f"and {len(shares) - _MOST_TASKS} more"]
    return [*lines, ("mixture", ", ".join(shares))]


def sparse_facts(settings: Settings, mesh: jax.sharding.Mesh) -> list[tuple[str, str]]:
    """Router, transport, capacity, and what to expect of them, of each stack."""
    stacks, lines = settings.layers.stacks, []
    for name, stack in stacks.items():
        if each := stack.settings("sparse"):
            side = f"{name}: " if len(stacks) > 1 else ""
            facts = _stack_facts(settings, mesh, each, causal=name == "decoder")
            lines += [(f"{side}{what}", words) for what, words in facts]
    return lines


def _stack_facts(
    settings: Settings,
    mesh: jax.sharding.Mesh,
    each: list[SparseSettings],
    *,
    causal: bool,
) -> list[tuple[str, str]]:
    """What `sparse_facts` says of one stack, whose sparse layers are given."""
    s = max(each, key=lambda s: s.num_experts)
    router, E, S = s.router, s.num_experts, s.router.group_size
    lines = [("router", _describe_router(settings, router, causal=causal))]
    if any(other != s for other in each):
        numbers = ", ".join(str(other.num_experts) for other in each)
        lines.append(("experts", f"{numbers} by layer; the rest is of layers with {E}"))
    axis_size = mesh.shape["expert"]
    has_ragged = auto.mesh_has_ragged_exchange(mesh)
    (taken, why), (eval_taken, eval_why) = (
        auto.transport_for(
            settings.execution.transport, s, axis_size, has_ragged, train=train
        )
        for train in (True, False)
    )
    transport = f"{taken} ({why})"
    if (eval_taken, eval_why) != (taken, why):
        transport += f"; held-out {eval_taken} ({eval_why})"
    lines.append(("transport", transport))
    if {taken, eval_taken} - set(auto.PADDED):
        lines.append(("expert products", _describe_products(settings, s, mesh)))
    slots, heldout = (capacity(router, E, train=train) for train in (True, False))
    if never_drops(router, E, train=True):
        room = "; ROW_BUDGET is for more than one device on the expert axis"
        if taken in auto.PADDED:
            room = f"; every expert computes {S} slots per group, {S} tokens"
        elif axis_size > 1:
            room = (
                f"; room for {settings.execution.row_budget:g} × an even share of rows"
            )
        heldout_drops = f"; held-out {heldout} slots per expert" if heldout < S else ""
        lines.append(
            (
                "capacity",
                f"nothing drops{room}{heldout_drops}",
            )
        )
        return lines
    lines.append(
        (
            "capacity",
            f"{slots} slots per expert in groups of {S} tokens, even load "
            f"{float(mean_choices(router, E)) * S / E:g}; held-out "
            f"{'nothing drops' if heldout == S else heldout}",
        )
    )
    if causal and router.slot_order == "choice_major" and router.num_choices(E) > 1:
        lines.append(("slot order", "choice by choice: drops depend on later tokens"))
    drops = expected_drops.of_router(router, E)
    if drops is not None:
        lines.append(("expected drops", f"{drops:.1%} by a router without preferences"))
    few = expected_drops.few_slots(router, E)
    if few:
        lines.append(("few slots", few + computed_for_few(router, E, taken)))
    return lines


def computed_for_few(router: RouterSettings, num_experts: int, taken: str) -> str:
    """Says what empty slots cost, with transports that compute them."""
    if taken not in auto.PADDED:
        return ""
    rows = capacity(router, num_experts, train=True) * num_experts / router.group_size
    return (
        f". TRANSPORT {taken!r} computes {rows:.3g} rows for each token, of which "
        f"{float(mean_choices(router, num_experts)):.3g} were chosen"
    )


def _describe_attention(run: Run) -> str:
    """Says by what tokens attend, kind of layer by kind, and why."""
    settings = run.settings
    block, found = settings.execution.attention_block, []
    for s, length in attention_check.kinds(run):
        way: str = "with all scores held"
        if settings.mesh.context > 1:
            way = f"{settings.partition.context_attention} over the context axis"
        elif 0 < block <= length:
            way = f"in blocks of {block}"
        kernel, why = attention_check.method_of(run, s, length)
        found.append(f"{kernel or way} ({why})")
    return "; ".join(dict.fromkeys(found))


def _describe_products(
    settings: Settings, s: SparseSettings, mesh: jax.sharding.Mesh
) -> str:
    """Says how experts over sorted rows are computed, and why."""
    device = mesh.devices.flat[0]
    cut = mesh.shape["model"] if settings.partition.expert_tensor_parallel else 1
    method, why = grouped_method.pick(
        device.platform,
        device.device_kind,
        settings.execution.dtype,
        num_experts=s.num_experts // mesh.shape["expert"],
        mlp_dim=s.experts.mlp_dim // cut,
        model_dim=settings.model.model_dim,
    )
    return f"{method} ({why})"


def _describe_router(
    settings: Settings, router: RouterSettings, *, causal: bool
) -> str:
    """Names the router, and says which losses it has no use for."""
    loss = settings.loss
    own = f"{router.family}" + (f" with {router.options}" if router.options else "")
    words = {
        router.family: own,
        "token_choice": f"top-{router.num_selected} of {settings.model.num_experts} by "
        f"{router.scores}",
        "prototypes": f"top-{router.num_selected} in each of {router.num_prototypes} "
        "prototypes",
        "expert_choice": "experts choose tokens",
        "hashed": "a table from token id to expert",
        "sinkhorn": f"top-{router.num_selected} of balanced assignments",
    }[router.family]
    extras = {
        f"{router.num_selected_groups} of {router.num_expert_groups} groups": (
            router.num_expert_groups > 1
        ),
        f"a bias for selection, by {router.bias_update}": router.selection_bias,
        "a bias of logits": router.logit_bias,
        "gates on inputs": router.gate_place == "input",
        "a shared expert": settings.model.shared_expert_mlp_dim > 0,
        "its gate": settings.model.shared_expert_gate,
        f"at most {router.max_experts_per_token} per token": (
            router.max_experts_per_token > 0
        ),
        "gates by scores": router.family == "hashed" and router.reads_logits,
        f"the first {settings.model.first_hash_layers} by a table": (
            settings.model.first_hash_layers > 0
        ),
        "spilling": router.overflow == "spill",
        "batch priority": router.slot_order == "batch_priority",
        "a random second expert": router.second_policy == "random",
        f"jitter {router.jitter:g}": router.jitter > 0,
        f"noise {router.logit_noise:g} / E": router.logit_noise > 0,
        "sees later tokens (ALLOW_FUTURE_LEAK)": causal and bool(leaks(router)),
    }
    words = ", ".join([words, *(name for name, there in extras.items() if there)])
    if not router.reads_logits and (loss.balance_weight or loss.router_z_weight):
        words += "; it has no logits, so balance and z losses are 0"
    return words
