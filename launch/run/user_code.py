"""Code of the user's that a configuration names: ROUTER = "my_lab.routers:soft".

Importing a module runs it. A gin file alone cannot have that: the command line has to
allow it. What was imported goes into the settings, beside its name.
"""

from launch.config.reader import ResolvedConfig


def admitted(config: ResolvedConfig, *, allowed: bool = False) -> ResolvedConfig:
    """Imports what the configuration names, tries it, and puts it into the settings.

    Args:
        config: configuration as it was read.
        allowed: whether modules that are not Switchyard's own may be imported.
    Raises:
        ConfigError: a name cannot be taken, and why; or the settings break rules now
            that more is known.
    """
    if not config.settings.names_code:
        return config
    from launch.run import own_code  # with every trial

    return own_code.admitted(config, allowed)


def with_objective(config: ResolvedConfig, *, allowed: bool = False) -> ResolvedConfig:
    """As `admitted`, for what makes rows of tokens alone."""
    if ":" not in config.settings.data.objective:
        return config
    from launch.run import own_code

    return own_code.admitted(config, allowed, only_objective=True)
