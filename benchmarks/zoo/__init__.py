"""The models of `configs/models`, and how their parameters compare with the papers'."""
