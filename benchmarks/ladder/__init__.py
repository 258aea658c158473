"""Every published model of a billion parameters or more, compiled for its slice."""
