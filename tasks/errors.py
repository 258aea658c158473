"""The one error of this package."""


class StoreError(ValueError):
    """Data that cannot be prepared, opened or read; the message says what to do."""
