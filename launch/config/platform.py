"""Sets what jax reads from the environment when it starts."""

import contextlib
import os
import platform as platform_module
import sys
import zlib
from collections.abc import Iterable, Mapping, MutableMapping

from launch.config.settings import PlatformSettings

# What XLA's CPU compiler hands to its YNN library in one piece comes back wrong on the
# jaxlib 0.10.2 and 0.12.0.1 of the lock; this hands it nothing. docs/hardware.md.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="


def prepare_environment(
    platform: PlatformSettings, environ: MutableMapping[str, str] = os.environ
) -> list[str]:
    """Sets platform, simulated devices, flags and cache, and says what was set.

    What the user exported wins. XLA_FLAGS and LIBTPU_INIT_ARGS are appended to, but a
    flag that is already in them keeps the user's value. Where jax may take the CPU,
    CPU_FLAG is appended too, unless the configuration gives that flag another value.

    Args:
        platform: what the configuration asks for.
        environ: changed in place.
    Returns:
        One line for every variable that was set, or that kept another value.
    """
    assert environ is not os.environ or "jax" not in sys.modules, (
        "prepare_environment came too late: jax is already imported and has read its "
        "environment; run the command line in a process of its own"
    )
    lines: list[str] = []
    if platform.name != "auto":
        lines += _set(environ, "JAX_PLATFORMS", platform.name, "PLATFORM")
    if platform.simulated_devices > 0:
        number = str(platform.simulated_devices)
        lines += _simulate(environ, number)
    flags = list(platform.xla_flags)
    if uses_cpu(environ) and _name(CPU_FLAG) not in map(_name, flags):
        flags.append(CPU_FLAG)
    lines += append_flags(environ, "XLA_FLAGS", flags)
    lines += append_flags(environ, "LIBTPU_INIT_ARGS", platform.libtpu_init_args)
    if platform.num_processes != 1 and environ.get("JAX_PLATFORMS") == "cpu":
        # Of CPU processes nothing else joins the devices.
        name = "JAX_CPU_COLLECTIVES_IMPLEMENTATION"
        lines += _set(environ, name, "gloo", "NUM_PROCESSES")
    cache = platform.compilation_cache_dir
    if cache == "auto":
        own = environ.get("JAX_COMPILATION_CACHE_DIR")
        cache = own or cache_folder(environ, environ.get("JAX_PLATFORMS", ""))
    if cache:
        lines += _set(
            environ, "JAX_COMPILATION_CACHE_DIR", cache, "COMPILATION_CACHE_DIR"
        )
    return lines


def uses_cpu(environ: Mapping[str, str]) -> bool:
    """Says whether JAX_PLATFORMS lets jax take the CPU; if it is not set, jax may."""
    return bool({"", "cpu"} & set(environ.get("JAX_PLATFORMS", "").split(",")))


def cache_folder(environ: Mapping[str, str], platforms: str) -> str:
    """Where compiled steps of this user are kept.

    What is compiled for a CPU holds its instructions, and a home may be shared by
    machines of several kinds.
    """
    base = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(base, "switchyard", "compiled")
    return os.path.join(folder, _cpu_kind()) if platforms == "cpu" else folder


def _cpu_kind() -> str:
    """A name for the instructions that this machine's CPU has."""
    words = platform_module.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                words += line
                break
    return f"cpu-{zlib.crc32(words.encode()):08x}"


def _set(
    environ: MutableMapping[str, str], name: str, value: str, macro: str
) -> list[str]:
    """Sets a variable, unless the user did; says which."""
    exported = environ.get(name)
    if not exported:
        environ[name] = value
        return [f"set {name}={value}"]
    if exported == value:
        return []
    return [f"kept your {name}={exported}, where {macro} asks for {value}"]


def _simulate(environ: MutableMapping[str, str], number: str) -> list[str]:
    """Asks for simulated devices, unless the user did so in the older way."""
    # jax prefers JAX_NUM_CPU_DEVICES to this flag, so setting it would override it.
    older = "--xla_force_host_platform_device_count"
    for flag in environ.get("XLA_FLAGS", "").split():
        if _name(flag) == older and "JAX_NUM_CPU_DEVICES" not in environ:
            return [f"kept your {flag}, where SIMULATED_DEVICES asks for {number}"]
    return _set(environ, "JAX_NUM_CPU_DEVICES", number, "SIMULATED_DEVICES")


def append_flags(
    environ: MutableMapping[str, str], name: str, flags: Iterable[str]
) -> list[str]:
    """Appends the flags that the user did not set; says which were kept.

    Args:
        environ: changed in place.
        name: XLA_FLAGS or LIBTPU_INIT_ARGS.
        flags: such as "--flag=1"; an empty value is one too.
    Returns:
        One line for every flag that kept another value, and one for those appended.
    """
    exported = environ.get(name, "").split()
    theirs = {_name(flag): flag for flag in exported}
    lines = [
        f"kept your {theirs[_name(flag)]} in {name}, where the run asks for {flag}"
        for flag in flags
        if theirs.get(_name(flag), flag) != flag
    ]
    if new := [flag for flag in flags if _name(flag) not in theirs]:
        environ[name] = " ".join([*exported, *new])
        verb = "appended to" if exported else "set"
        lines.append(f"{verb} {name}: {' '.join(new)}")
    return lines


def _name(flag: str) -> str:
    return flag.partition("=")[0]
