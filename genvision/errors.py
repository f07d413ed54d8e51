"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A wrong file, key or value. The message is one line: what is wrong, what was expected, how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


def check_sizes(**sizes: int | None) -> None:
    """Raises UserError for the first that is below 1; None stands for one that is not used."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{name} must be at least 1, got {size}")


def check_rates(**rates: float) -> None:
    """Raises UserError for the first that is no probability."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise UserError(f"{name} must lie in 0 .. 1, got {rate}")
