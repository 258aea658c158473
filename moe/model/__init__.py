"""The transformer: containers of parameters and pure functions over them."""
