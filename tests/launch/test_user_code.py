"""What a configuration names of the user's is admitted, tried, or refused in a line."""

import dataclasses
import sys

import pytest
from commands import inline

from launch.config import reader
from launch.errors import ConfigError
from launch.run import user_code
from launch.run.assemble import assemble
from moe.routing.capacity import mean_choices
from moe.settings import RouterSettings
from moe.settings.own import Options

TINY = "runs/tiny.gin"

ROUTERS = '''
import jax
import jax.numpy as jnp

from moe.routing.assignment import Choices, assign
from moe.settings import Router


def route(logits_GSE, context, settings, *, capacity, tau=1.0, extra=0):
    G, S, E = logits_GSE.shape
    K = settings.num_selected + extra
    probability_GSE = jax.nn.softmax(logits_GSE / tau)
    gate_GSK, expert_GSK = jax.lax.top_k(probability_GSE, K)
    choices = Choices(
        expert_GSJ=expert_GSK,
        active_GSJ=jnp.broadcast_to(context.mask_GS[..., None], (G, S, K)),
        first_GSJ=jnp.broadcast_to(jnp.arange(K) == 0, (G, S, K)),
        gate_GSJ=gate_GSK,
        probability_GSE=probability_GSE,
    )
    return assign(choices, logits_GSE, context.mask_GS, settings, capacity=capacity)


soft = Router(route, causal=True)
wide = Router(
    lambda *arrays, capacity: route(*arrays, capacity=capacity, extra=1),
    causal=True,
    num_choices=lambda settings, num_experts: settings.num_selected + 1,
)


def by_id(logits_GSE, context, settings, *, capacity):
    """Token ids alone."""
    E = logits_GSE.shape[-1]
    likes_GSE = -jnp.abs(context.token_GS[..., None] % E - jnp.arange(E)) * 1.0
    return route(likes_GSE, context, settings, capacity=capacity)


ids = Router(by_id, causal=True, reads_logits=False)


def last(logits_GSE, context, settings, *, capacity):
    """Of real tokens the last one leads."""
    S = logits_GSE.shape[1]
    place_GS = jnp.where(context.mask_GS, jnp.arange(S), -1)
    leader_G = jnp.argmax(place_GS, axis=1)
    led_GSE = logits_GSE + jnp.take_along_axis(logits_GSE, leader_G[:, None, None], 1)
    return route(led_GSE, context, settings, capacity=capacity)


honest = Router(last, causal=False)
liar = Router(last, causal=True)


def negative(*arrays, capacity):
    import dataclasses

    found = route(*arrays, capacity=capacity)
    return dataclasses.replace(found, gate_GSJ=-found.gate_GSJ)


def mixing(logits_GSE, *rest, capacity):
    return route(logits_GSE + logits_GSE[:1] * 2, *rest, capacity=capacity)


def peeking(logits_GSE, *rest, capacity):
    centred_GSE = logits_GSE - logits_GSE.mean(1, keepdims=True)
    return route(centred_GSE, *rest, capacity=capacity)


def failing(logits_GSE, *rest, capacity):
    raise ValueError("no\\nluck")


broken = {
    "narrow": Router(lambda *a, capacity: route(*a, capacity=capacity, extra=1), True),
    "negative": Router(negative, True),
    "mixing": Router(mixing, True),
    "peeking": Router(peeking, False),
    "failing": Router(failing, True),
    "nothing": Router(lambda *a, capacity: None, True),
    "positional": Router(lambda logits_GSE, context: None, True),
}
globals().update(broken)
'''
OPTIM = """
import jax.numpy as jnp
import optax


def lion(specs, *, b1=0.9, b2=0.99):
    return optax.scale_by_lion(b1, b2)


def growing(specs):
    def update(updates, state, params=None):
        return updates, jnp.ones(3)

    return optax.GradientTransformation(lambda params: jnp.ones(2), update)


def halved(specs):
    return optax.stateless(lambda updates, params: {"half": updates})


def nothing(specs):
    return None


def line(peak, num_steps, *, end=0.0):
    return optax.linear_schedule(peak, end * peak, num_steps)


def below(peak, num_steps):
    return lambda count: -peak * jnp.ones(())


def vector(peak, num_steps):
    return lambda count: jnp.ones(2)
"""
OBJECTIVES = """
import itertools

import numpy as np

from tasks.draws import below
from tasks.objectives import Asked, Maker, Objective


def half(data, vocabulary, *, first=0.5):
    def ask(tokens, key):
        n = int(first * len(tokens))
        return Asked(tokens[:n], tokens[n:], np.arange(n, len(tokens)))

    return Maker(data.length, ask)


def of(ask, **more):
    return Objective(maker=lambda data, vocabulary: Maker(data.length, ask), **more)


def all_of(tokens, sources=None):
    sources = np.arange(len(tokens)) if sources is None else sources
    return Asked(tokens[:0], tokens, sources)


def writing(tokens, key):
    tokens[0] = 7
    return all_of(tokens)


def refusing(data, vocabulary):
    raise ValueError("TASK_FEATURE_LENGTHS: make them longer")


tail = Objective(maker=half)
long = of(lambda tokens, key: all_of(np.append(tokens, 1), np.arange(len(tokens) + 1)))
longer = of(lambda t, key: Asked(t, np.append(t, 1), np.append(np.arange(len(t)), 0)))
unsourced = of(lambda tokens, key: all_of(tokens, np.arange(0)))
foreign = of(lambda tokens, key: all_of(tokens + 10_000))
halves = of(lambda tokens, key: all_of(tokens / 2))
silent = of(lambda tokens, key: all_of(tokens[:0]))
pair = of(lambda tokens, key: (tokens, tokens))
writer = of(writing)
calls = itertools.count()
moody = of(lambda tokens, key: all_of(tokens + next(calls) % 2))
none = Objective(maker=lambda data, vocabulary: None)
empty = Objective(maker=lambda data, vocabulary: Maker(0, None))
unmade = Objective()
stored = Objective(maker=half, reads=("inputs", "targets"))
marked = Objective(maker=half, sentinels=2)
encoded = Objective(maker=half, layouts=("encoder_decoder",))
paired = Objective(maker=half, lengths=("inputs", "targets"))
refused = Objective(maker=refusing)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A working directory with modules of the user's."""
    (tmp_path / "routers_of_lab.py").write_text(ROUTERS)
    (tmp_path / "optim_of_lab.py").write_text(OPTIM)
    (tmp_path / "objectives_of_lab.py").write_text(OBJECTIVES)
    (tmp_path / "faulty_of_lab.py").write_text("1 / 0\n")
    (tmp_path / "needy_of_lab.py").write_text("import not_there_of_lab\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_of_lab")]:
        del sys.modules[name]


def admitted(*knobs: str):
    return user_code.admitted(reader.read([TINY], knobs), allowed=True)


def problems_of(*knobs: str, allowed: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        user_code.admitted(reader.read([TINY], knobs), allowed=allowed)
    assert not any("\n" in problem for problem in raised.value.problems)
    return list(raised.value.problems)


# ------------------------------------------------------------------ what is read


@pytest.mark.fast
@pytest.mark.parametrize("macro", ["ROUTER", "OPTIMIZER", "SCHEDULE"])
def test_a_name_is_read_without_importing_anything(macro):
    config = reader.read([TINY], [f"{macro}=not_there.at_all:it"])
    assert f"{macro} = 'not_there.at_all:it'" in config.operative
    for wrong in ("a b:c", "a:b:c", "a.:c", "a:", ":b", "a:class"):
        with pytest.raises(ConfigError, match=r"must be 'module:name', such as"):
            reader.read([TINY], [f"{macro}={wrong!r}"])


@pytest.mark.fast
def test_words_that_are_not_there_are_told_with_those_that_are():
    with pytest.raises(ConfigError) as raised:
        reader.read([TINY], ["ROUTER=token_choise", "SCHEDULE=cosin", "OPTIMIZER=lion"])
    text = str(raised.value)
    assert "'sinkhorn', or 'module:name' of your own; nearest: token_choice" in text
    assert "or 'module:name' of your own; nearest: cosine" in text
    assert (
        "must be one of 'adamw', 'adafactor', 'muon', or 'module:name' of your own"
        in text
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "is_right"),
    [
        ("{'a': 1, 'b': 0.5, 'c': 'x', 'd': True, 'e': (1, 'y')}", True),
        ("{'a': [1, 2]}", True),
        ("{'a': None}", False),
        ("{'a': {'b': 1}}", False),
        ("{'a': ((1,),)}", False),
        ("{'a b': 1}", False),
        ("{1: 1}", False),
        ("('a', 1)", False),
    ],
)
def test_options_are_plain_values_by_name(options, is_right):
    knobs = ["ROUTER=lab:soft", f"ROUTER_OPTIONS={options}"]
    if not is_right:
        with pytest.raises(ConfigError, match="must be a dict of numbers, texts"):
            reader.read([TINY], knobs)
        return
    config = reader.read([TINY], knobs)
    hash(config.settings.router)
    lines = config.operative.splitlines()
    with_text = [line for line in lines if line.startswith("ROUTER_OPTIONS")]
    again = reader.read([TINY], ["ROUTER=lab:soft", with_text[0].split("  #")[0]])
    assert again.settings.router == config.settings.router


@pytest.mark.fast
def test_equal_options_have_one_hash():
    one, other = Options({"a": 1, "b": [2]}), Options({"b": (2,), "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Options({"a": 1})


@pytest.mark.fast
@pytest.mark.parametrize("macro", ["ROUTER", "OPTIMIZER", "SCHEDULE", "OBJECTIVE"])
def test_options_mean_nothing_to_switchyards_own(macro):
    with pytest.raises(ConfigError, match=f"{macro}_OPTIONS = .* means nothing to"):
        reader.read([TINY], [f"{macro}_OPTIONS={{'a': 1}}"])


@pytest.mark.fast
def test_knobs_that_it_would_not_know_of_are_refused():
    with pytest.raises(ConfigError) as raised:
        reader.read(
            [TINY],
            [
                *("ROUTER=lab:soft", "OPTIMIZER=lab:lion", "SCHEDULE=lab:line"),
                *("HASH_SEED=3", "RENORMALIZE_GATES=before_drop", "LOGIT_NOISE=1.0"),
                *("SLOT_ORDER=batch_priority", "NUM_SELECTED_EXPERTS=2"),
                *("BETA1=0.5", "BETA2=0.5", "EPSILON=1e-3"),
                "FINAL_LEARNING_RATE_FRACTION=0.5",
            ],
        )
    text = str(raised.value)
    for macro in ("HASH_SEED", "LOGIT_NOISE", "BETA1", "BETA2", "EPSILON", "FINAL_LE"):
        assert f"  {macro}" in text, macro
    assert "'before_drop' is for ROUTER = 'lab:soft' itself to do" in text
    assert "'batch_priority' is for ROUTER = 'lab:soft' itself to do" in text


def test_each_stack_has_a_router_of_its_own(lab):
    config = admitted(
        *("ARCHITECTURE=encoder_decoder", "OBJECTIVE=seq2seq", "GROUP_SIZE=16"),
        "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 32}",
        *("ROUTER=routers_of_lab:soft", "ROUTER_OPTIONS={'tau': 0.5}"),
        "ENCODER_ROUTER=routers_of_lab:honest",
        "ENCODER_ROUTER_OPTIONS={}",
    )
    settings = config.settings
    assert settings.router.own.causal
    assert not settings.encoder_router.own.causal, "an encoder sees all"
    with pytest.raises(
        ConfigError, match=r"ENCODER_ROUTER_OPTIONS = .'tau': 0.5. mean"
    ):
        reader.read(
            [TINY],
            [
                *("ARCHITECTURE=encoder_decoder", "OBJECTIVE=seq2seq"),
                "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 32}",
                *("ROUTER=lab:soft", "ROUTER_OPTIONS={'tau': 0.5}"),
                "ENCODER_ROUTER=expert_choice",
            ],
        )


# ------------------------------------------------------------------ what is admitted


def test_a_gin_file_alone_runs_no_code(lab):
    knobs = [
        "ROUTER=faulty_of_lab:soft",
        "OPTIMIZER=faulty_of_lab:lion",
        "SCHEDULE=faulty_of_lab:line",
        "OBJECTIVE=faulty_of_lab:tail",
    ]
    problems = problems_of(*knobs, allowed=False)
    macros = ("ROUTER", "OBJECT", "OPTIM", "SCHED")
    for problem, macro in zip(problems, macros, strict=True):
        assert problem.startswith(macro)
        assert "faulty_of_lab is not one of Switchyard's own modules" in problem
        assert problem.endswith("add --allow_module to the command")
    with pytest.raises(ConfigError, match="add --allow_module"):
        assemble(reader.read([TINY], knobs))
    assert "faulty_of_lab" not in sys.modules


def test_what_was_admitted_is_assembled_and_not_asked_for_again(lab):
    config = admitted(
        "ROUTER=routers_of_lab:soft",
        "ROUTER_OPTIONS={'tau': 0.5}",
        "OPTIMIZER=optim_of_lab:lion",
        "SCHEDULE=optim_of_lab:line",
        "SCHEDULE_OPTIONS={'end': 0.5}",
    )
    assert user_code.admitted(config) is config
    run = assemble(config)
    peak, steps = config.settings.optimizer.learning_rate, config.settings.train
    end = run.learner.schedule(steps.train_steps)
    assert float(end) == pytest.approx(peak / 2)
    hash(config.settings.router)


def test_a_dense_model_imports_no_router():
    config = reader.read([TINY], ["MOE_EVERY=0", "ROUTER=not_there:soft"])
    assert user_code.admitted(config) is config


def test_numbers_of_choices_and_logits_are_those_described(lab):
    wide = admitted("ROUTER=routers_of_lab:wide").settings
    assert wide.router.num_choices(8) == wide.router.num_selected + 1
    assert mean_choices(wide.router, 8) == wide.router.num_selected + 1
    by_id = admitted("ROUTER=routers_of_lab:ids")
    shapes = assemble(by_id).shapes.params
    assert "router" not in str(shapes)
    assert (
        "reads no logits"
        in problems_of("ROUTER=routers_of_lab:ids", "JITTER_NOISE=0.1")[0]
    )
    with pytest.raises(AssertionError, match="not imported"):
        RouterSettings(family="lab:soft").num_choices(8)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (
            "ROUTER=nowhere_of_lab:soft",
            "there is no module 'nowhere_of_lab' in the w",
        ),
        ("ROUTER=nowhere_of_lab.a:soft", "there is no module 'nowhere_of_lab' in the "),
        ("ROUTER=faulty_of_lab:soft", "ZeroDivisionError: division by zero, at "),
        ("ROUTER=needy_of_lab:soft", "ModuleNotFoundError: No module named 'not_there"),
        ("ROUTER=routers_of_lab:sof", "routers_of_lab has no 'sof'; nearest: soft"),
        ("ROUTER=routers_of_lab:route", "is a function, not a moe.settings.Router: "),
        ("ROUTER=moe.routing.token_choice:route", "is a function, not a moe.settings."),
        ("ROUTER=routers_of_lab:narrow", "contract of routers: slot_of_choice_GSJ is "),
        (
            "ROUTER=routers_of_lab:negative",
            "contract of routers: a gate is negative",
        ),
        ("ROUTER=routers_of_lab:mixing", "a group changes with another group, in trai"),
        (
            "ROUTER=routers_of_lab:peeking",
            "a token changes with what padding holds",
        ),
        ("ROUTER=routers_of_lab:liar", "it is not causal: what becomes of a token cha"),
        ("ROUTER=routers_of_lab:failing", "ValueError: no luck, at "),
        ("ROUTER=routers_of_lab:nothing", "it returned a NoneType, not an Assignment"),
        (
            "ROUTER=routers_of_lab:positional",
            "cannot be called as route(logits_GSE, context, settings, *, capacity,",
        ),
        (
            "ROUTER=routers_of_lab:soft ROUTER_OPTIONS={'tua':0.3}",
            "takes no option 'tua' of ROUTER_OPTIONS; nearest: tau; it takes tau",
        ),
        (
            "ROUTER=routers_of_lab:soft ROUTER_OPTIONS={'capacity':3}",
            "takes no option 'capacity' of ROUTER_OPTIONS",
        ),
        (
            "ROUTER=routers_of_lab:soft ROUTER_OPTIONS={'tau':'warm'}",
            "TypeError: unsupported operand",
        ),
        (
            "ROUTER=routers_of_lab:honest",
            "says that it is not causal: what becomes of a token may depend on later",
        ),
        ("OPTIMIZER=optim_of_lab:nothing", "returned a NoneType, not a GradientTrans"),
        ("OPTIMIZER=optim_of_lab:growing", "its state after an update: an array float"),
        ("OPTIMIZER=optim_of_lab:halved", "its updates: another structure than before"),
        ("OPTIMIZER=optim_of_lab:jnp", "is a module, not a function"),
        (
            "OPTIMIZER=optim_of_lab:lion OPTIMIZER_OPTIONS={'b3':0.9}",
            "takes no option 'b3' of OPTIMIZER_OPTIONS; ",
        ),
        ("OBJECTIVE=objectives_of_lab:half", "is a function, not a tasks.objectives.O"),
        ("OBJECTIVE=objectives_of_lab:stored", "is made of stored targets alone"),
        ("OBJECTIVE=objectives_of_lab:unmade", "is a NoneType, not a function"),
        ("OBJECTIVE=objectives_of_lab:none", "its maker returned a NoneType, not a M"),
        ("OBJECTIVE=objectives_of_lab:empty", "its row_tokens is 0: it must be at l"),
        ("OBJECTIVE=objectives_of_lab:pair", "it made a tuple, not an Asked, of 1 t"),
        ("OBJECTIVE=objectives_of_lab:longer", "which do not fit TASK_FEATURE_LENGTHS"),
        ("OBJECTIVE=objectives_of_lab:long", "sources has 0 to 1, not from 0 to 0"),
        ("OBJECTIVE=objectives_of_lab:unsourced", "it made 1 targets of 0 sources: "),
        ("OBJECTIVE=objectives_of_lab:silent", "it made 0 targets of 0 sources: the"),
        ("OBJECTIVE=objectives_of_lab:foreign", "targets has 10"),
        ("OBJECTIVE=objectives_of_lab:halves", "targets is float64[1], not a row of"),
        ("OBJECTIVE=objectives_of_lab:writer", "it changes the 1 tokens that it is g"),
        ("OBJECTIVE=objectives_of_lab:moody", "it makes other rows of 1 tokens with"),
        ("OBJECTIVE=objectives_of_lab:refused", "TASK_FEATURE_LENGTHS: make them lon"),
        ("OBJECTIVE=objectives_of_lab:marked", "EXTRA_IDS = 0 has none: set it to 2"),
        (
            "OBJECTIVE=objectives_of_lab:encoded",
            "is not for ARCHITECTURE = 'decoder', which can have 'causal_lm', ",
        ),
        (
            "OBJECTIVE=objectives_of_lab:tail OBJECTIVE_OPTIONS={'frist':0.9}",
            "takes no option 'frist' of OBJECTIVE_OPTIONS; nearest: first; it takes f",
        ),
        ("SCHEDULE=optim_of_lab:below", "the rate of step 0 of 15 is -0.0"),
        ("SCHEDULE=optim_of_lab:vector", "the rate of a step is not one number"),
        (
            "SCHEDULE=optim_of_lab:line SCHEDULE_OPTIONS={'edn':0.9}",
            "takes no option 'edn' of SCHEDULE_OPTIONS; nearest: end; it takes end",
        ),
    ],
)
def test_what_cannot_be_taken_is_told_in_a_line(lab, knobs, words):
    (problem,) = problems_of(*knobs.split())
    assert problem.startswith(knobs.split("=")[0])
    assert words in problem


def test_lengths_that_an_objective_does_not_have_are_refused(lab):
    (problem,) = problems_of("OBJECTIVE=objectives_of_lab:paired")
    assert problem.startswith("TASK_FEATURE_LENGTHS = {'targets': 64}: OBJECTIVE")
    assert "has 'inputs' and 'targets', each of at least 2 tokens" in problem


def test_a_router_that_is_not_causal_needs_leave(lab):
    knobs = ["ROUTER=routers_of_lab:honest", "ALLOW_FUTURE_LEAK=True"]
    assert not admitted(*knobs).settings.router.own.causal


# ------------------------------------------------------------------------- the verbs


def test_every_verb_takes_a_run_with_code_of_the_users(trained, lab):
    knobs = {
        "TRAIN_STEPS": 2,
        "WARMUP_STEPS": 1,
        "ROUTER": "routers_of_lab:soft",
        "ROUTER_OPTIONS": "{'tau': 0.5}",
        "OPTIMIZER": "optim_of_lab:lion",
        "SCHEDULE": "optim_of_lab:line",
        "OBJECTIVE": "objectives_of_lab:tail",
        "OBJECTIVE_OPTIONS": "{'first': 0.25}",
    }
    folder = lab / "run"
    words = trained.knobs(folder, **knobs)
    of_run = [f"--model_dir={folder}"]
    plan = ["plan", *words, "--topology=v5e:2x2", "--mesh=data=2,expert=2"]
    for command in (["train", *words], ["train", "--dry_run", *words], plan):
        refused = inline(*command)
        assert refused.code == 1
        assert refused.err.count("add --allow_module to the command") == 4
    assert not folder.exists()
    done = inline("train", *words, "--allow_module")
    assert done.code == 0, done.err
    assert "routers_of_lab:soft with {'tau': 0.5}" in done.err
    inspect = ["prepare", "--inspect", *words]
    assert inline(*inspect).err.count("add --allow_module to the command") == 1
    shown = inline(*inspect, "--allow_module")
    assert shown.code == 0, shown.err
    assert "as OBJECTIVE = 'objectives_of_lab:tail' makes them" in shown.out
    for command in (["evaluate", *of_run], ["generate", *of_run, "--prompt=def "]):
        assert "add --allow_module" in inline(*command).err
        done = inline(*command, "--allow_module")
        assert done.code == 0, done.err
    for command in (plan, ["train", "--dry_run", *words]):
        done = inline(*command, "--allow_module")
        assert done.code == 0, done.err


def test_the_process_that_compiles_a_plan_needs_leave_too(lab, monkeypatch):
    from launch.planning.compiler import child
    from launch.planning.hardware.topologies import parse

    knobs = ["ROUTER=routers_of_lab:soft", "MESH_DATA=2", "MESH_EXPERT=2"]
    config = reader.read([TINY], [*knobs, "SIMULATED_DEVICES=4", "BATCH_SIZE=16"])
    (lab / "config.gin").write_text(config.operative)
    monkeypatch.setattr(child, "prepare_environment", lambda platform: [])
    with pytest.raises(ConfigError, match="add --allow_module"):
        child._compile(
            lab / "config.gin", parse("v5e:2x2"), "/dev/null", allow_module=False
        )


def test_settings_are_the_same_but_for_what_was_imported(lab):
    read = reader.read([TINY], ["ROUTER=routers_of_lab:soft"])
    config = user_code.admitted(read, allowed=True)
    bare = dataclasses.replace(config.settings.router, own=None)
    assert bare == read.settings.router
    assert config.operative == read.operative
